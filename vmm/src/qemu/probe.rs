//! What QEMU there is, and whether it may use KVM.

use std::{
    fmt, fs, io,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use kuasar_sandboxers::{Error, Result, reaper::Reaper};
use serde::{Deserialize, Serialize};

use super::{Accel, Accelerator, OLDEST};
use crate::sys;

/// A cold page cache may make it load for seconds.
const LIMIT: Duration = Duration::from_secs(20);

/// How long the processor's clock is watched.
const SAMPLE: Duration = Duration::from_millis(20);

const KVM: &str = "/dev/kvm";

/// What must stand behind `/dev/kvm`: it opens on hosts whose processor cannot do it, too.
const MODULES: [&str; 2] = ["kvm_intel", "kvm_amd"];

/// A version of QEMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Version(pub u32, pub u32, pub u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl Version {
    /// From `QEMU emulator version 7.2.22 (Debian …)`.
    fn parse(text: &str) -> Option<Self> {
        let numbers = text.lines().next()?.strip_prefix("QEMU emulator version ")?;
        let numbers = numbers.split(|character: char| !character.is_ascii_digit() && character != '.').next()?;
        let mut numbers = numbers.split('.').map(|number| number.parse().ok());
        Some(Self(numbers.next()??, numbers.next()??, numbers.next().flatten().unwrap_or(0)))
    }
}

/// What does not change while the program is the same and the host is not booted again.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct Facts {
    pub(super) version: Version,
    pub(super) time_stamp_khz: Option<u64>,
}

impl Facts {
    /// Asks QEMU, and watches the processor's clock meanwhile.
    pub(super) async fn find_out(program: &Path, reaper: &Reaper) -> Result<Self> {
        let (version, time_stamp_khz) = tokio::join!(version(program, reaper), time_stamps_per_ms());
        Ok(Self { version: version?, time_stamp_khz })
    }
}

/// The version of a QEMU, if it is one that is taken.
async fn version(program: &Path, reaper: &Reaper) -> Result<Version> {
    let unavailable = |why| Error::Unavailable { what: "QEMU".into(), why };
    let mut command = Command::new(program);
    command.arg("-version").env_remove("LD_PRELOAD");
    let output = match reaper.run(&mut command, LIMIT).await {
        Err(Error::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
            return Err(unavailable(format!("{} does not exist; install QEMU, or set its path", program.display())));
        }
        output => output?,
    };
    let said = String::from_utf8_lossy(&output.stdout);
    let Some(found) = Version::parse(&said).filter(|_| output.status == 0) else {
        let said: String = said.chars().chain(String::from_utf8_lossy(&output.stderr).chars()).take(200).collect();
        return Err(unavailable(format!("{} does not tell its version, but {said:?}", program.display())));
    };
    if found < OLDEST {
        let program = program.display();
        return Err(unavailable(format!("{program} is version {found}, and {OLDEST} or newer is needed; install a newer one")));
    }
    Ok(found)
}

/// What is to run the guest's instructions. `/dev/kvm` is not even opened where no processor stands behind it.
pub(super) fn accelerator(wanted: Accel) -> Result<Accelerator> {
    let absent = match wanted {
        Accel::Tcg => return Ok(Accelerator::Tcg),
        Accel::Auto | Accel::Kvm => match kvm(Path::new("/sys/module"), Path::new(KVM)) {
            Ok(()) => return Ok(Accelerator::Kvm),
            Err(why) => why,
        },
    };
    if wanted == Accel::Kvm {
        let why = format!("{absent}; configure accel = \"auto\" or \"tcg\", or enable virtualisation in the host's firmware");
        return Err(Error::Unavailable { what: "KVM".into(), why });
    }
    tracing::info!(reason = absent, "no KVM: QEMU translates the guest's instructions, some ten times slower");
    Ok(Accelerator::Tcg)
}

fn kvm(modules: &Path, device: &Path) -> Result<(), String> {
    if !MODULES.iter().any(|module| modules.join(module).is_dir()) {
        return Err(format!("neither {} is loaded", MODULES.join(" nor ")));
    }
    let open = fs::File::options().read(true).write(true).open(device).and_then(|device| device.metadata());
    let mode = open.map_err(|error| format!("{}: {error}", device.display()))?.permissions().mode();
    if kvm_is_closed(mode) {
        let (device, mode) = (device.display(), mode & 0o777);
        return Err(format!(
            "only its owner may open {device} (mode {mode:o}), and QEMU runs as another user; chmod 666 {device}"
        ));
    }
    Ok(())
}

/// Whether a `/dev/kvm` of this mode cannot be opened by QEMU, which runs as a user of its own and does it itself.
#[must_use]
pub fn kvm_is_closed(mode: u32) -> bool {
    !allows(mode, OTHERS) && !allows(mode, GROUP)
}

/// Reading and writing, in a file's mode, by its group and by all others.
const GROUP: u32 = 0o060;
const OTHERS: u32 = 0o006;

fn allows(mode: u32, all: u32) -> bool {
    mode & all == all
}

/// The groups a user must be in to open `/dev/kvm`, as which QEMU opens it itself.
pub(super) fn kvm_groups() -> Result<Vec<u32>> {
    let found = fs::metadata(KVM).map_err(Error::io("look at", KVM))?;
    let mode = found.permissions().mode();
    Ok(if !allows(mode, OTHERS) && allows(mode, GROUP) { vec![found.gid()] } else { Vec::new() })
}

/// How fast the processor's time stamp counter runs, in kHz; `None` when it cannot be told.
async fn time_stamps_per_ms() -> Option<u64> {
    let measure = || {
        // The quickest of several pairs is the one that nothing came between.
        let now = || {
            let pairs = (0..16).map(|_| {
                let before = sys::time_stamp();
                let now = Instant::now();
                (sys::time_stamp().wrapping_sub(before), before, now)
            });
            pairs.min_by_key(|(length, ..)| *length).map(|(length, before, now)| (before.wrapping_add(length / 2), now))
        };
        let (first, begin) = now()?;
        std::thread::sleep(SAMPLE);
        let (last, end) = now()?;
        let nanoseconds = u64::try_from(end.duration_since(begin).as_nanos()).ok()?;
        last.checked_sub(first)?.checked_mul(1_000_000)?.checked_div(nanoseconds)
    };
    tokio::task::spawn_blocking(measure).await.ok().flatten().filter(|khz| (100_000..100_000_000).contains(khz))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        let parse = |numbers: &str| Version::parse(&format!("QEMU emulator version {numbers}\nCopyright"));
        assert_eq!(parse("7.2.22 (Debian 1:7.2+dfsg-7)"), Some(Version(7, 2, 22)));
        assert_eq!(parse("10.0.0"), Some(Version(10, 0, 0)));
        assert_eq!(parse("9.1-rc1"), Some(Version(9, 1, 0)));
        assert_eq!((parse("x"), Version::parse(""), Version::parse("qemu-img version 7.2.1")), (None, None, None));
        assert!(Version(10, 0, 0) > OLDEST && Version(6, 2, 9) < OLDEST);
    }

    #[tokio::test]
    async fn the_processors_clock_is_measured() {
        let (one, two) = (time_stamps_per_ms().await.unwrap(), time_stamps_per_ms().await.unwrap());
        assert!(one.abs_diff(two) < one / 100, "{one} {two}");
    }

    #[test]
    fn a_device_without_a_processor_behind_it_is_not_opened() {
        let dir = tempfile::tempdir().unwrap();
        let device = dir.path().join("kvm");
        fs::write(&device, "").unwrap();
        let opened = || fs::metadata(&device).unwrap().accessed().unwrap();
        let before = opened();
        assert!(kvm(dir.path(), &device).unwrap_err().contains("kvm_intel"));
        assert_eq!(opened(), before);
        fs::create_dir(dir.path().join("kvm_amd")).unwrap();
        for (mode, is_open) in [(0o600, false), (0o640, false), (0o660, true), (0o666, true)] {
            fs::set_permissions(&device, fs::Permissions::from_mode(mode)).unwrap();
            let found = kvm(dir.path(), &device);
            assert_eq!(found.is_ok(), is_open, "{mode:o}: {found:?}");
        }
        assert!(kvm(dir.path(), &dir.path().join("none")).unwrap_err().contains("none"));
    }
}
