//! The OCI runtime specification of a container, as a document.
//!
//! Kept as JSON, not as a typed struct: a struct would silently strip every field newer than itself (seccomp notify, time
//! offsets, personality …), and what a pod author asks for must reach the runtime. Typed views are taken where needed.

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{Error, Result};

/// An OCI runtime specification (config.json), checked to have what every runtime needs: `process` and `root`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OciSpec(Value);

impl OciSpec {
    /// Reads a document.
    ///
    /// # Errors
    /// [`Error::Invalid`] when it is not a JSON object, or lacks `process` (with `args`) or `root`.
    pub fn parse(json: &[u8]) -> Result<Self> {
        let value: Value = serde_json::from_slice(json)
            .map_err(|error| Error::invalid("container spec", format!("config.json is not JSON: {error}")))?;
        for key in ["process", "root"] {
            if !value.get(key).is_some_and(Value::is_object) {
                return Err(Error::invalid("container spec", format!("config.json has no {key:?} object")));
            }
        }
        Ok(Self(value))
    }

    /// The document.
    #[must_use]
    pub fn as_value(&self) -> &Value {
        &self.0
    }

    /// The document, to be changed.
    pub fn as_value_mut(&mut self) -> &mut Value {
        &mut self.0
    }
}
