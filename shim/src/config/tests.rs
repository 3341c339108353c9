use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    time::Duration,
};

use proptest::prelude::*;

use kuasar_runc::{RuncConfig, RuntimeChoice};

use super::*;

fn parse(text: &str) -> Result<Config, ConfigErrors> {
    Config::parse(Path::new("c.toml"), text)
}

/// The faults of a text, as printed, one a line.
fn faults(text: &str) -> Vec<String> {
    parse(text).unwrap_err().to_string().lines().map(str::to_owned).collect()
}

fn runc(config: &Config, name: &str) -> RuncConfig {
    match &config.sandboxers[name] {
        SandboxerConfig::Runc(config) => config.clone(),
        SandboxerConfig::Vmm(_) => panic!("{name} is of another kind"),
    }
}

#[test]
fn nothing_written_means_the_defaults() {
    let config = parse("").unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.sandboxers.keys().collect::<Vec<_>>(), ["kuasar-runc"]);
    assert_eq!(runc(&config, "kuasar-runc").runtime, RuntimeChoice::Auto);
    assert_eq!(parse("[sandboxer]\n").unwrap(), Config::default());
}

#[test]
fn what_is_written_counts() {
    let text = "
        [containerd]
        address = '/run/k3s/containerd/containerd.sock'
        [log]
        level = 'debug'
        [sandboxer.fast]
        kind = 'runc'
        runtime = 'crun'
        [sandboxer.mine]
        kind = 'runc'
        runtime = '/opt/bin/my-runtime'
    ";
    let config = parse(text).unwrap();
    assert_eq!(config.containerd.address, Path::new("/run/k3s/containerd/containerd.sock"));
    assert_eq!(config.log.level, LogLevel::Debug);
    // Naming sandboxers replaces the default one.
    assert_eq!(config.sandboxers.keys().collect::<Vec<_>>(), ["fast", "mine"]);
    assert_eq!(runc(&config, "fast").runtime.to_string(), "crun");
    assert_eq!(runc(&config, "mine").runtime, RuntimeChoice::Path("/opt/bin/my-runtime".into()));
}

#[test]
fn every_fault_is_told_with_its_place() {
    let text = "\
[containerd]
adress = '/x'
[log]
level = 'loud'
[sandboxer.kuasar-runc]
kind = 'runc'
runtime = 5
[sandboxer.Bad_Name]
kind = 'vm'
[sandboxer.none]
[extra]
";
    let expected = [
        "c.toml:2: containerd.adress: is not a known key; accepted here: address",
        "c.toml:4: log.level: \"loud\" is not a log level; accepted: error, warn, info, debug, trace",
        "c.toml:7: sandboxer.kuasar-runc.runtime: is an integer; accepted: a string",
        "c.toml:8: sandboxer.Bad_Name: \"Bad_Name\" is not a name for a sandboxer; accepted: up to 63 lower case letters, \
         digits and inner hyphens, as in kuasar-runc",
        "c.toml:9: sandboxer.Bad_Name.kind: \"vm\" is not a kind of sandboxer; accepted: runc",
        "c.toml:10: sandboxer.none: has no kind; accepted: kind = \"runc\"",
        "c.toml:11: extra: is not a known key; accepted here: containerd, log, sandboxer",
    ];
    assert_eq!(faults(text), expected);
}

#[test]
fn wrong_types_and_values_are_named() {
    let cases = [
        ("containerd = 1", "c.toml:1: containerd: is an integer; accepted: a table, written [containerd]"),
        ("[[log]]", "log: is an array; accepted: a table"),
        ("[log]\nlevel = true", "c.toml:2: log.level: is a boolean; accepted: a string"),
        ("[containerd]\naddress = 'run/x'", "containerd.address: \"run/x\" is not an absolute path"),
        ("[containerd]\naddress = 'unix:///x'", "\"unix:///x\" is not an absolute path"),
        ("[containerd]\naddress = '/a/../b'", "has no .. in it"),
        ("[containerd]\naddress = \"/a\\u0000b\"", "is not an absolute path"),
        (
            "[sandboxer.a]\nkind = 'runc'\nruntime = 'kata'",
            "\"kata\" is not an OCI runtime; accepted: auto, runc, crun, youki, or an absolute path",
        ),
        ("[sandboxer.a]\nkind = 'runc'\nruntime = '/'", "is not an absolute path"),
        ("[sandboxer.a]\nkind = 'runc'\n'b c' = 1", "c.toml:3: sandboxer.a.\"b c\": is not a known key"),
        ("[sandboxer.podsandbox]\nkind = 'runc'", "means something else to containerd"),
        ("[sandboxer.runc]\nkind = 'runc'", "means something else to containerd"),
        ("[sandboxer.-a]\nkind = 'runc'", "is not a name"),
        ("[sandboxer.'a.b']\nkind = 'runc'", "is not a name"),
        ("sandboxer.a = 'runc'", "sandboxer.a: is a string; accepted: a table, written [sandboxer.a]"),
    ];
    for (text, fault) in cases {
        let found = faults(text);
        assert_eq!(found.len(), 1, "{text}: {found:?}");
        assert!(found[0].contains(fault), "{text}: {found:?}");
    }
    let long = format!("[sandboxer.{}]\nkind = 'runc'", "a".repeat(64));
    assert!(faults(&long)[0].contains("is not a name"));
}

#[test]
fn a_name_given_twice_is_told() {
    let found = faults("[sandboxer.a]\nkind = 'runc'\n[sandboxer.a]\nkind = 'runc'\n");
    assert!(found[0].starts_with("c.toml:3: not valid TOML: duplicate key"), "{found:?}");
}

#[test]
fn broken_lines_do_not_hide_other_faults() {
    let found = faults("[log]\nlevel = \n[containerd]\naddress = 7\n= 3\n");
    assert_eq!(found.iter().filter(|line| line.contains("not valid TOML")).count(), 2, "{found:?}");
    assert!(found.iter().any(|line| line.starts_with("c.toml:4: containerd.address: is an integer")), "{found:?}");
}

/// A directory with `config.toml` and drop-ins.
struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.0.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn load(&self) -> Result<Config, ConfigErrors> {
        Config::load(&self.path("config.toml"), Path::new(DEFAULT_STATE))
    }
}

#[test]
fn drop_ins_are_merged_in_order_of_their_names() {
    let dir = Dir::new();
    dir.write("config.toml", "[log]\nlevel = 'warn'\n[sandboxer.a]\nkind = 'runc'\nruntime = 'runc'\n");
    dir.write("conf.d/20.toml", "[sandboxer.a]\nruntime = 'youki'\n[sandboxer.b]\nkind = 'runc'\n");
    dir.write("conf.d/10.toml", "[sandboxer.a]\nruntime = 'crun'\n[containerd]\naddress = '/c'\n");
    dir.write("conf.d/99.toml.bak", "nonsense");
    dir.write("conf.d/.30.toml", "nonsense");
    let config = dir.load().unwrap();
    assert_eq!(config.log.level, LogLevel::Warn);
    assert_eq!(config.containerd.address, Path::new("/c"));
    assert_eq!(config.sandboxers.keys().collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!(runc(&config, "a").runtime.to_string(), "youki");
}

#[test]
fn faults_name_the_file_they_are_in() {
    let dir = Dir::new();
    let main = dir.write("config.toml", "[log]\nlevel = 1\n");
    let drop_in = dir.write("conf.d/a.toml", "x = 1\n[log\n");
    let text = dir.load().unwrap_err().to_string();
    assert!(text.contains(&format!("{}:2: log.level:", main.display())), "{text}");
    assert!(text.contains(&format!("{}:1: x: is not a known key", drop_in.display())), "{text}");
    assert!(text.contains(&format!("{}:2: not valid TOML", drop_in.display())), "{text}");
}

#[test]
fn only_the_default_file_may_be_missing() {
    let dir = Dir::new();
    let path = dir.path("config.toml");
    let faults = Config::load(&path, Path::new(DEFAULT_STATE)).unwrap_err();
    assert!(faults.to_string().contains("does not exist"), "{faults}");
    assert_eq!(Config::load_files(&path, true, Path::new(DEFAULT_STATE)).unwrap(), Config::default());
    dir.write("conf.d/a.toml", "[log]\nlevel = 'trace'\n");
    assert_eq!(Config::load_files(&path, true, Path::new(DEFAULT_STATE)).unwrap().log.level, LogLevel::Trace);
}

#[test]
fn files_that_others_can_write_are_refused() {
    let dir = Dir::new();
    let path = dir.write("config.toml", "");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o646)).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("can be written by everybody (mode 0646)"));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(dir.load().is_ok());
    let drop_in = dir.write("conf.d/a.toml", "");
    fs::set_permissions(dir.path("conf.d"), fs::Permissions::from_mode(0o777)).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("conf.d: can be written by everybody"));
    fs::set_permissions(dir.path("conf.d"), fs::Permissions::from_mode(0o755)).unwrap();
    if nix::unistd::geteuid().is_root() {
        std::os::unix::fs::chown(&drop_in, Some(12345), None).unwrap();
        let text = dir.load().unwrap_err().to_string();
        assert!(text.contains("a.toml: is owned by uid 12345"), "{text}");
    }
}

#[test]
fn what_is_no_text_file_is_refused() {
    let dir = Dir::new();
    let path = dir.path("config.toml");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("not a regular file"));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("not a regular file"));
    fs::remove_dir(&path).unwrap();
    fs::write(&path, [b'#', 0xff]).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("not UTF-8 text (at byte 1)"));
    fs::write(&path, " ".repeat((1 << 20) + 1)).unwrap();
    assert!(dir.load().unwrap_err().to_string().contains("larger than 1024 KiB"));
    fs::remove_file(&path).unwrap();
    symlink(dir.write("elsewhere", "[log]\nlevel = 'error'\n"), &path).unwrap();
    assert_eq!(dir.load().unwrap().log.level, LogLevel::Error);
}

#[test]
fn the_annotated_example_says_what_the_defaults_are() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../packaging/config.toml");
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(Config::parse(&path, &text).unwrap(), Config::default());
    // With what is commented out it has every key, so it can serve as the reference.
    let all: String = text.lines().map(|line| format!("{}\n", line.strip_prefix("#:").unwrap_or(line))).collect();
    let written: toml::Table = all.parse().unwrap();
    let printed: toml::Table = Config::default().to_toml().parse().unwrap();
    assert_eq!(written, printed);
}

#[test]
fn sandboxers_have_directories_of_their_own() {
    let config = parse("[sandboxer.a]\nkind = 'runc'\n[sandboxer.b]\nkind = 'runc'\n").unwrap();
    assert_eq!(runc(&config, "a").root, Path::new("/run/kuasar/runc/a"));
    assert_eq!(runc(&config, "b").root, Path::new("/run/kuasar/runc/b"));
    let dir = Dir::new();
    dir.write("config.toml", "");
    let config = Config::load(&dir.path("config.toml"), Path::new("/elsewhere")).unwrap();
    assert_eq!(runc(&config, "kuasar-runc").root, Path::new("/elsewhere/runc/kuasar-runc"));
    for root in ["/x", "/x/y", "/"] {
        let text = format!("[sandboxer.a]\nkind = 'runc'\nroot = '/x'\n[sandboxer.b]\nkind = 'runc'\nroot = '{root}'\n");
        let found = faults(&text);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].starts_with("c.toml:6: sandboxer.b.root: "), "{found:?}");
    }
    let inherited = faults("[sandboxer.a]\nkind = 'runc'\nroot = '/run/kuasar/runc'\n[sandboxer.b]\nkind = 'runc'\n");
    assert!(inherited[0].starts_with("c.toml:4: sandboxer.b.root: /run/kuasar/runc/b is not its own"), "{inherited:?}");
}

#[test]
fn numbers_have_a_range() {
    let limit = |value: &str| parse(&format!("[sandboxer.a]\nkind = 'runc'\ncommand_limit_secs = {value}\n"));
    assert_eq!(runc(&limit("0x10").unwrap(), "a").command_limit, Duration::from_secs(16));
    for (value, words) in [
        ("0", "0 is out of range; accepted: an integer from 1 to 3600"),
        ("-5", "-5 is out of range"),
        ("99999999999999999999", "is an integer beyond 64 bits"),
        ("1.5", "is a float; accepted: an integer"),
        ("'60'", "is a string; accepted: an integer"),
    ] {
        let faults = limit(value).unwrap_err().to_string();
        assert!(faults.starts_with("c.toml:3: sandboxer.a.command_limit_secs: ") && faults.contains(words), "{faults}");
    }
}

fn any_path() -> impl Strategy<Value = PathBuf> {
    "(/[a-zA-Z0-9 _.'\"=#\\[\\]äß-]{0,8}[a-z]){1,4}".prop_map(PathBuf::from)
}

fn any_runtime() -> impl Strategy<Value = RuntimeChoice> {
    prop_oneof![
        prop::sample::select(vec!["auto", "runc", "crun", "youki"]).prop_map(|name| name.parse().unwrap()),
        any_path().prop_map(RuntimeChoice::Path),
    ]
}

fn any_config() -> impl Strategy<Value = Config> {
    let sandboxer = (any_runtime(), any_path(), 1..=3600u64);
    let name = "[a-z]([a-z0-9-]{0,20}[a-z0-9])?"
        .prop_filter("reserved", |name| !["podsandbox", "shim", "runc"].contains(&name.as_str()));
    (any_path(), prop::sample::select(LogLevel::ALL.to_vec()), prop::collection::btree_map(name, sandboxer, 1..4)).prop_map(
        |(address, level, sandboxers)| {
            let configured = |(name, (runtime, root, seconds)): (String, (RuntimeChoice, PathBuf, u64))| {
                // No directory may lie in another's.
                let root = Path::new("/roots").join(&name).join(root.strip_prefix("/").unwrap());
                let command_limit = Duration::from_secs(seconds);
                (name, SandboxerConfig::Runc(RuncConfig { runtime, root, command_limit }))
            };
            let sandboxers = sandboxers.into_iter().map(configured).collect();
            Config { containerd: Containerd { address }, log: Log { level }, sandboxers }
        },
    )
}

proptest! {
    #[test]
    fn a_configuration_survives_being_written(config in any_config()) {
        prop_assert_eq!(parse(&config.to_toml()).unwrap(), config);
    }

    #[test]
    fn no_text_makes_it_panic(text in any::<String>()) {
        let _either = parse(&text);
    }

    #[test]
    fn no_text_like_toml_makes_it_panic(parts in prop::collection::vec(prop::sample::select(vec![
        "[", "]", "[[", "]]", "{", "}", "=", ".", ",", "\n", "\r\n", "'", "\"", "'''", "\"\"\"", "#", " ", "\\u00", "log", "level", "sandboxer",
        "a", "kind", "'runc'", "runtime", "containerd", "address", "'/x'", "1979-05-27", "1e5", "0x1", "true", "inf", "é", "\u{0}",
    ]), 0..40)) {
        let text = parts.concat();
        if let Err(faults) = parse(&text) {
            prop_assert!(!faults.faults().is_empty());
            prop_assert!(faults.faults().iter().all(|fault| fault.line.is_some_and(|line| line >= 1 && line <= text.lines().count() + 1)), "{}", faults);
        }
    }
}
