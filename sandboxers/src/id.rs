//! Validated identifiers.
//!
//! Every id becomes part of a path under the daemon's state directory, so the rules are containerd's own (`pkg/identifiers`):
//! at most 76 bytes of ASCII letters and digits, with single `.`, `_` or `-` between them. That excludes `/`, `..`, NUL and
//! the empty string by construction.

use std::{borrow::Borrow, fmt, path::Path, str::FromStr};

use serde::{Deserialize, Serialize};

use crate::error::Error;

/// The longest identifier containerd accepts, in bytes.
pub const MAX_LEN: usize = 76;

fn check(kind: &'static str, id: &str) -> Result<(), Error> {
    let invalid = |why: String| Err(Error::Invalid { what: kind.into(), why });
    if id.is_empty() {
        return invalid("it is empty".into());
    }
    if id.len() > MAX_LEN {
        return invalid(format!("it has {} bytes, at most {MAX_LEN} are allowed", id.len()));
    }
    let separator = |b: u8| matches!(b, b'.' | b'_' | b'-');
    let bytes = id.as_bytes();
    let good = bytes.iter().all(|b| b.is_ascii_alphanumeric() || separator(*b))
        && !separator(bytes[0])
        && !separator(bytes[bytes.len() - 1])
        && !bytes.windows(2).any(|pair| separator(pair[0]) && separator(pair[1]));
    if good {
        Ok(())
    } else {
        invalid(format!("{id:?} may only have letters and digits, with single '.', '_' or '-' between them"))
    }
}

macro_rules! identifiers {
    ($($(#[$doc:meta])* $name:ident = $kind:literal;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(Box<str>);

        impl $name {
            /// The identifier as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Error;
            fn from_str(id: &str) -> Result<Self, Error> {
                check($kind, id)?;
                Ok(Self(id.into()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = Error;
            fn try_from(id: String) -> Result<Self, Error> {
                check($kind, &id)?;
                Ok(Self(id.into()))
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0.into()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl AsRef<Path> for $name {
            fn as_ref(&self) -> &Path {
                Path::new(&*self.0)
            }
        }

        impl Borrow<str> for $name {
            fn borrow(&self) -> &str {
                &self.0
            }
        }
    )*};
}

identifiers! {
    /// A containerd namespace (`k8s.io`, `moby`, `default`): sandbox and container ids are unique only within one.
    Namespace = "namespace";
    /// A sandbox (pod) within its namespace.
    SandboxId = "sandbox id";
    /// A container within its namespace.
    ContainerId = "container id";
    /// An additional process (`exec`) within its container.
    ExecId = "exec id";
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn accepts_what_containerd_accepts() {
        for id in ["a", "k8s.io", "moby", "a-b_c.d", &"f".repeat(MAX_LEN)] {
            assert_eq!(id.parse::<SandboxId>().unwrap().as_str(), id);
        }
    }

    #[test]
    fn refuses_what_could_leave_the_state_directory() {
        for id in ["", ".", "..", "a/b", "/a", "a\0b", "a..b", "-a", "a-", "é", "a b", &"f".repeat(300)] {
            assert!(id.parse::<ContainerId>().is_err(), "{id:?}");
        }
    }

    proptest! {
        #[test]
        fn an_accepted_id_is_one_plain_path_component(id in "\\PC{0,90}") {
            if let Ok(id) = id.parse::<ExecId>() {
                let path: &Path = id.as_ref();
                prop_assert_eq!(path.components().count(), 1);
                prop_assert_eq!(path.file_name().and_then(|name| name.to_str()), Some(id.as_str()));
            }
        }
    }
}
