//! The table of a sandboxer of `kind = "vmm"`.

use std::{ops::RangeInclusive, path::Path, time::Duration};

use kuasar_vmm::{
    Annotation, HypervisorConfig, VmmConfig,
    qemu::{Accel, Machine, QemuConfig},
};

use super::section::Section;

/// The hypervisors by name.
const HYPERVISORS: [&str; 1] = ["qemu"];

const MACHINES: [(&str, Machine); 2] = [("q35", Machine::Q35), ("microvm", Machine::Microvm)];
const ACCELS: [(&str, Accel); 3] = [("auto", Accel::Auto), ("kvm", Accel::Kvm), ("tcg", Accel::Tcg)];

/// Processors that a machine may be given.
const CPUS: RangeInclusive<i64> = 1..=1024;
/// Memory that a machine may be given, in MiB.
const MEMORY_MIB: RangeInclusive<i64> = 64..=(16 << 20);
const OVERHEAD_MIB: RangeInclusive<i64> = 0..=65_536;
const BOOT_LIMIT_SECS: RangeInclusive<i64> = 1..=3600;
/// User ids: none of the system's, and room for a machine each.
const USERS_FROM: RangeInclusive<i64> = 1000..=4_000_000_000;
const HOT_DISKS: RangeInclusive<i64> = 0..=16;

pub(super) fn read(name: &str, mut table: Section<'_>, state: &Path) -> VmmConfig {
    let missing = table.is_missing("hypervisor");
    let hypervisor = table.checked("hypervisor", |name| {
        HYPERVISORS
            .into_iter()
            .find(|known| *known == name)
            .ok_or_else(|| format!("{name:?} is not a hypervisor; accepted: {}", HYPERVISORS.join(", ")))
    });
    if missing {
        table.fault_here(format!(
            "has no hypervisor; accepted: {}",
            HYPERVISORS.map(|name| format!("hypervisor = \"{name}\"")).join(", ")
        ));
    }
    // With an unknown one what else is written is checked all the same.
    let _ = hypervisor;
    let mut qemu = QemuConfig { path: table.absolute_path("path"), ..QemuConfig::default() };
    if let Some(machine) = table.checked("machine", |text| one_of("machine", &MACHINES, text)) {
        qemu.machine = machine;
    }
    if let Some(accel) = table.checked("accel", |text| one_of("accelerator", &ACCELS, text)) {
        qemu.accel = accel;
    }
    qemu.hot_disks = table.integer("hot_disks", HOT_DISKS).and_then(|count| usize::try_from(count).ok());
    let mut config = VmmConfig::new(HypervisorConfig::Qemu(qemu), state.join("vmm").join(name));
    config.kernel = table.absolute_path("kernel");
    config.initrd = table.absolute_path("initrd");
    config.virtiofsd = table.absolute_path("virtiofsd");
    config.vsock_device = table.absolute_path("vsock_device");
    if let Some(words) = table.list("kernel_parameters", word) {
        config.kernel_parameters = words;
    }
    if let Some(root) = table.absolute_path("root") {
        config.root = root;
    }
    let mut small = |key, range: RangeInclusive<i64>, value: &mut u32| {
        if let Some(number) = table.integer(key, range).and_then(|number| u32::try_from(number).ok()) {
            *value = number;
        }
    };
    small("cpus", CPUS, &mut config.cpus);
    small("max_cpus", CPUS, &mut config.max_cpus);
    let mut large = |key, range: RangeInclusive<i64>, value: &mut u64| {
        if let Some(number) = table.integer(key, range) {
            *value = number.unsigned_abs();
        }
    };
    large("memory_mib", MEMORY_MIB, &mut config.memory_mib);
    large("guest_overhead_mib", OVERHEAD_MIB, &mut config.guest_overhead_mib);
    large("max_memory_mib", MEMORY_MIB, &mut config.max_memory_mib);
    if let Some(names) = table.list("annotations", str::parse::<Annotation>) {
        config.annotations = names.into_iter().collect();
    }
    if let Some(seconds) = table.integer("boot_limit_secs", BOOT_LIMIT_SECS) {
        config.boot_limit = Duration::from_secs(seconds.unsigned_abs());
    }
    if let Some(first) = table.integer("users_from", USERS_FROM) {
        config.users_from = u32::try_from(first).ok();
    }
    if let Some(debug) = table.boolean("debug") {
        config.debug = debug;
    }
    table.finish();
    config
}

fn one_of<T: Copy>(what: &str, known: &[(&str, T)], text: &str) -> Result<T, String> {
    known.iter().find(|(name, _)| *name == text).map(|(_, value)| *value).ok_or_else(|| {
        let names: Vec<_> = known.iter().map(|(name, _)| *name).collect();
        format!("{text:?} is no {what}; accepted: {}", names.join(", "))
    })
}

/// A word of the kernel's command line.
fn word(text: &str) -> Result<String, String> {
    if text.is_empty() || text.bytes().any(|byte| !byte.is_ascii_graphic()) {
        return Err(format!("{text:?} is no word for a kernel's command line; accepted: printable characters without spaces"));
    }
    Ok(text.to_owned())
}

/// The table that means this.
pub(super) fn to_toml(config: &VmmConfig) -> toml::Table {
    let mut table = toml::Table::new();
    let mut set = |key: &str, value: toml::Value| {
        table.insert(key.into(), value);
    };
    let number = |number: u64| i64::try_from(number).unwrap_or(i64::MAX).into();
    set("kind", "vmm".into());
    match &config.hypervisor {
        HypervisorConfig::Qemu(qemu) => {
            set("hypervisor", "qemu".into());
            if let Some(path) = &qemu.path {
                set("path", path.display().to_string().into());
            }
            for (name, _) in MACHINES.into_iter().filter(|(_, machine)| *machine == qemu.machine) {
                set("machine", name.into());
            }
            for (name, _) in ACCELS.into_iter().filter(|(_, accel)| *accel == qemu.accel) {
                set("accel", name.into());
            }
            if let Some(count) = qemu.hot_disks {
                set("hot_disks", number(count as u64));
            }
        }
    }
    let paths = [
        ("kernel", &config.kernel),
        ("initrd", &config.initrd),
        ("virtiofsd", &config.virtiofsd),
        ("vsock_device", &config.vsock_device),
    ];
    for (key, path) in paths {
        if let Some(path) = path {
            set(key, path.display().to_string().into());
        }
    }
    set("kernel_parameters", config.kernel_parameters.clone().into());
    set("root", config.root.display().to_string().into());
    set("cpus", config.cpus.into());
    set("max_cpus", config.max_cpus.into());
    set("memory_mib", number(config.memory_mib));
    set("guest_overhead_mib", number(config.guest_overhead_mib));
    if config.max_memory_mib > 0 {
        set("max_memory_mib", number(config.max_memory_mib));
    }
    let annotations: Vec<_> = config.annotations.iter().map(|annotation| annotation.name().to_owned()).collect();
    set("annotations", annotations.into());
    set("boot_limit_secs", number(config.boot_limit.as_secs()));
    if let Some(first) = config.users_from {
        set("users_from", first.into());
    }
    set("debug", config.debug.into());
    table
}
