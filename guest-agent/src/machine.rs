//! The machine itself: its clock, its processors and memory, and its end.

use std::{
    fs, io,
    io::Read,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use kuasar_guest_protocol::agent::{DiagnoseResponse, OnlineResponse, diagnose_response::Section};
use kuasar_sandboxers::{Error, Result, process};
use nix::{
    sys::{
        reboot::{RebootMode, reboot},
        time::TimeSpec,
    },
    time::{ClockId, clock_gettime, clock_settime},
};
use tracing::{debug, error};

use crate::{sys, uevent};

/// A clock that is wrong by less is left alone: setting it costs more than it mends.
const TOLERANCE: Duration = Duration::from_millis(1);

/// A clock that is wrong by less runs faster or slower for a while: it never jumps, above all not backwards, by what the host's word has taken
/// to arrive. One that is wrong by more has stood still, as in a pause.
const STEP: Duration = Duration::from_secs(1);

const SYSTEM: &str = "/sys/devices/system";

/// The longest section of a diagnosis, in bytes.
const SECTION: usize = 32 << 10;

/// How much of the kernel's log is told, in bytes.
const KERNEL_LOG: usize = 64 << 10;

/// Microseconds since the kernel started.
#[must_use]
pub(crate) fn uptime_us() -> u64 {
    let now = clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    u64::try_from(now.as_micros()).unwrap_or(u64::MAX)
}

/// Sets the clock, if it differs: at once where nobody has looked at it yet, or where it is wrong by much.
pub(crate) fn set_time(time_ns: i64, is_new: bool) -> Result<()> {
    let wanted = u64::try_from(time_ns).ok().filter(|ns| *ns > 0).map(Duration::from_nanos);
    let Some(wanted) = wanted else { return Err(Error::invalid("time", format!("{time_ns} ns is before 1970"))) };
    let failed = |operation: &'static str| move |errno| Error::failed(operation)(io::Error::from(errno));
    let now = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME).map_err(failed("read the clock"))?);
    match correction(now, wanted) {
        Correction::None => Ok(()),
        Correction::Slew(us) if !is_new => sys::slew_clock(us).map_err(Error::failed("adjust the clock")),
        Correction::Slew(_) | Correction::Step => {
            debug!(wrong_by = ?now.abs_diff(wanted), "setting the clock");
            clock_settime(ClockId::CLOCK_REALTIME, TimeSpec::from_duration(wanted)).map_err(failed("set the clock"))
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Correction {
    None,
    /// By so many microseconds.
    Slew(i64),
    Step,
}

fn correction(now: Duration, wanted: Duration) -> Correction {
    let wrong_by = now.abs_diff(wanted);
    if wrong_by <= TOLERANCE {
        return Correction::None;
    }
    match i64::try_from(wrong_by.as_micros()) {
        Ok(us) if wrong_by < STEP => Correction::Slew(if wanted > now { us } else { -us }),
        _ => Correction::Step,
    }
}

/// Brings processors and memory into use, as soon as they are there: the kernel hears of added ones some time after the host has them.
pub(crate) async fn online(cpus: u32, memory_bytes: u64) -> Result<OnlineResponse> {
    let what = format!("{cpus} processors and {} MiB of memory", memory_bytes >> 20);
    let used = uevent::appear(&what, || {
        let used = online_cpus(cpus)?;
        let enough = used >= cpus && (memory_bytes == 0 || online_memory()? >= memory_bytes);
        Ok(enough.then_some(used))
    });
    Ok(OnlineResponse { cpus: used.await?, memory_bytes: memory_bytes_used()?, ..Default::default() })
}

/// Uses as many processors as there are, up to `wanted`; how many those are.
fn online_cpus(wanted: u32) -> Result<u32> {
    let mut used = 0;
    for cpu in numbered(&Path::new(SYSTEM).join("cpu"), "cpu")? {
        let switch = cpu.join("online");
        // The first one often has no switch.
        let on = !switch.exists() || read(&switch)?.trim() == "1";
        if !on && wanted > used {
            write(&switch, "1")?;
        }
        used += u32::from(on || wanted > used);
    }
    Ok(used)
}

/// Uses all memory that is there; how many bytes that may have at most, for the last block of the first memory need not be whole.
fn online_memory() -> Result<u64> {
    let memory = Path::new(SYSTEM).join("memory");
    let size = read(&memory.join("block_size_bytes"))?;
    let size = u64::from_str_radix(size.trim(), 16).map_err(Error::failed("read the size of memory blocks"))?;
    let blocks = numbered(&memory, "memory")?;
    for block in &blocks {
        let state = block.join("state");
        if read(&state)?.trim() == "offline" {
            write(&state, "online")?;
        }
    }
    Ok(size * blocks.len() as u64)
}

/// Directories called by a word and a number, in the order of that.
fn numbered(dir: &Path, word: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(Error::io("list", dir))? {
        let entry = entry.map_err(Error::io("list", dir))?;
        let number = entry.file_name().to_str().and_then(|name| name.strip_prefix(word)?.parse::<u32>().ok());
        found.extend(number.map(|number| (number, entry.path())));
    }
    found.sort_unstable();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).map_err(Error::io("read", file))
}

fn write(file: &Path, value: &str) -> Result<()> {
    fs::write(file, value).map_err(Error::io("write", file))
}

fn memory_bytes_used() -> Result<u64> {
    let text = read(Path::new("/proc/meminfo"))?;
    let total =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    total.map(|kib| kib << 10).ok_or_else(|| Error::invalid("/proc/meminfo", "it has no MemTotal"))
}

/// What is known inside.
pub(crate) fn diagnose() -> DiagnoseResponse {
    let mut sections = vec![section("kernel log", kernel_log()), section("processes", processes())];
    let files = [
        ("mounts", "/proc/mounts"),
        ("memory", "/proc/meminfo"),
        ("pressure of memory", "/proc/pressure/memory"),
        ("interfaces", "/proc/net/dev"),
        ("IPv4 addresses", "/proc/net/fib_trie"),
        ("IPv4 routes", "/proc/net/route"),
        ("IPv6 addresses", "/proc/net/if_inet6"),
        ("load", "/proc/loadavg"),
        ("command line", "/proc/cmdline"),
    ];
    sections.extend(files.map(|(title, path)| section(title, read(Path::new(path)))));
    DiagnoseResponse { sections, ..Default::default() }
}

fn section(title: &str, text: Result<String>) -> Section {
    let mut text = text.unwrap_or_else(|error| format!("cannot be told: {}", error.report()));
    let limit = if title == "kernel log" { KERNEL_LOG } else { SECTION };
    if text.len() > limit {
        // The end of a log matters most; of the rest nobody reads so much.
        let start = (text.len() - limit..text.len()).find(|start| text.is_char_boundary(*start)).unwrap_or(text.len());
        text.drain(..start);
    }
    Section { title: title.into(), text, ..Default::default() }
}

fn kernel_log() -> Result<String> {
    let path = "/dev/kmsg";
    let open = fs::File::options().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let mut log = open.map_err(Error::io("open", path))?;
    let mut text = String::new();
    let mut record = vec![0; 8 << 10];
    loop {
        match log.read(&mut record) {
            Ok(0) => return Ok(text),
            // "priority,number,microseconds,-;text", then lines of keys.
            Ok(length) => {
                let record = String::from_utf8_lossy(&record[..length]);
                let (head, said) = record.split_once(';').unwrap_or(("", &record));
                let us: u64 = head.split(',').nth(2).and_then(|us| us.parse().ok()).unwrap_or(0);
                let line = said.lines().next().unwrap_or_default();
                text.push_str(&format!("[{:5}.{:06}] {line}\n", us / 1_000_000, us % 1_000_000));
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(text),
            // The oldest record was overwritten meanwhile.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EPIPE | libc::EINTR)) => {}
            Err(error) => return Err(Error::io("read", path)(error)),
        }
    }
}

fn processes() -> Result<String> {
    let mut text = String::new();
    process::command_lines(|pid, command| {
        let command = String::from_utf8_lossy(&command[..command.len().min(256)]).replace('\0', " ");
        // Kernel threads have none.
        if !command.is_empty() {
            text.push_str(&format!("{pid:6} {}\n", command.escape_debug()));
        }
        Ok(())
    })?;
    Ok(text)
}

/// Switches the machine off, as far as it can be.
pub(crate) fn power_off() {
    // Without ACPI nothing can be switched off, and the kernel would stand still for ever; a VMM takes a restart for the end.
    let how = if Path::new("/sys/firmware/acpi").exists() { RebootMode::RB_POWER_OFF } else { RebootMode::RB_AUTOBOOT };
    let Err(errno) = reboot(how);
    // Without the right to, this is not process 1 of a machine.
    error!(%errno, "cannot switch the machine off");
}

#[cfg(test)]
#[allow(clippy::unwrap_used)] // a test may
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_is_right_is_left_alone() {
        let now = Duration::from(clock_gettime(ClockId::CLOCK_REALTIME).unwrap());
        set_time(i64::try_from(now.as_nanos()).unwrap(), false).unwrap();
        assert!(set_time(0, false).is_err() && set_time(i64::MIN, true).is_err());
    }

    #[test]
    fn a_clock_jumps_only_when_it_has_stood_still() {
        let at = |ms: u64| Duration::from_millis(1_000_000 + ms);
        for (now, wanted, expected) in [
            (0, 1, Correction::None),
            (0, 300, Correction::Slew(300_000)),
            (300, 0, Correction::Slew(-300_000)),
            (0, 1000, Correction::Step),
            (60_000, 0, Correction::Step),
        ] {
            assert_eq!(correction(at(now), at(wanted)), expected, "{now} {wanted}");
        }
    }

    #[tokio::test]
    async fn what_is_in_use() {
        let told = online(0, 0).await.unwrap();
        assert!(told.cpus >= 1 && told.memory_bytes > 1 << 20);
    }

    #[test]
    fn diagnoses_are_bounded() {
        let told = diagnose();
        assert!(told.sections.iter().any(|section| section.title == "mounts" && section.text.contains(" / ")));
        assert!(told.sections.iter().map(|section| section.text.len()).sum::<usize>() <= 256 << 10);
        assert_eq!(section("x", Ok("ä".repeat(SECTION))).text.len(), SECTION);
    }
}
