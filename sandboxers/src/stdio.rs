//! Where a process's input and output go.

use serde::{Deserialize, Serialize};

/// containerd's three stdio fields, as it sent them: a FIFO path, a `file://` or `binary://` log URI, a streaming URL
/// (`ttrpc+unix://…?streaming_id=…`), or empty for none.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// Standard input.
    pub stdin: String,
    /// Standard output.
    pub stdout: String,
    /// Standard error; ignored with a terminal.
    pub stderr: String,
    /// The process gets a pseudo-terminal.
    pub terminal: bool,
}
