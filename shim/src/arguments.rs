//! The command line of kuasard. It is here because kuasarctl writes kuasard's manual page and completions from it.

use std::path::PathBuf;

use clap::Parser;

/// Runs the pods of a node for containerd, each in the sandbox technique it asks for.
#[derive(Debug, Parser)]
#[command(name = "kuasard", version)]
pub struct Args {
    /// Configuration file; conf.d/*.toml beside it is read too [default: $KUASAR_CONFIG or /etc/kuasar/config.toml]
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Directory for sockets and for what lives as long as the node is up
    #[arg(long, value_name = "DIR", default_value = "/run/kuasar")]
    pub state: PathBuf,
    /// Directory for what outlives a reboot
    #[arg(long, value_name = "DIR", default_value = "/var/lib/kuasar")]
    pub root: PathBuf,
}
