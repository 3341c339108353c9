//! A table being read: known keys are taken out, each checked by itself; what is left in the end was not known.

use std::{
    collections::BTreeMap,
    ops::RangeInclusive,
    path::{Component, Path, PathBuf},
    str::FromStr,
};

use super::{
    fault::{Faults, Origin},
    tree::{Node, Value},
};

/// One table and its place in the file.
pub(super) struct Section<'a> {
    /// Key path; empty for the document itself.
    path: String,
    origin: Origin,
    entries: BTreeMap<String, Node>,
    known: Vec<&'static str>,
    faults: &'a mut Faults,
}

impl<'a> Section<'a> {
    /// The document.
    pub(super) fn root(node: Node, faults: &'a mut Faults) -> Self {
        let entries = match node.value {
            Value::Table(entries) => entries,
            // A document is always a table.
            _ => BTreeMap::new(),
        };
        Self { path: String::new(), origin: node.origin, entries, known: Vec::new(), faults }
    }

    /// Path of a key in this table, quoted where TOML would need it.
    fn key(&self, key: &str) -> String {
        let bare = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_".contains(&byte));
        let key = if bare { key.to_owned() } else { format!("{key:?}") };
        if self.path.is_empty() { key } else { format!("{}.{key}", self.path) }
    }

    fn take(&mut self, key: &'static str) -> Option<Node> {
        self.known.push(key);
        self.entries.remove(key)
    }

    /// Notes that something is wrong with a key (or, for a missing key, with the table).
    pub(super) fn fault(&mut self, origin: &Origin, key: &str, problem: impl Into<String>) {
        let key = self.key(key);
        self.faults.at(origin, key, problem);
    }

    /// Notes that something is wrong with a key of a table in this one.
    pub(super) fn fault_in(&mut self, origin: &Origin, table: &str, key: &str, problem: impl Into<String>) {
        let key = format!("{}.{key}", self.key(table));
        self.faults.at(origin, key, problem);
    }

    /// Takes a table.
    pub(super) fn table(&mut self, key: &'static str) -> Option<Section<'_>> {
        let node = self.take(key)?;
        self.enter(key, node)
    }

    /// Takes every table in this one, whatever its name.
    pub(super) fn tables(&mut self, mut read: impl FnMut(&str, Section<'_>)) {
        for (name, node) in std::mem::take(&mut self.entries) {
            if let Some(section) = self.enter(&name, node) {
                read(&name, section);
            }
        }
    }

    fn enter(&mut self, key: &str, node: Node) -> Option<Section<'_>> {
        let path = self.key(key);
        let Value::Table(entries) = node.value else {
            self.fault(&node.origin, key, format!("is {}; accepted: a table, written [{path}]", node.value.kind()));
            return None;
        };
        Some(Section { path, origin: node.origin, entries, known: Vec::new(), faults: self.faults })
    }

    /// Whether nobody wrote this key.
    pub(super) fn is_missing(&self, key: &str) -> bool {
        !self.entries.contains_key(key)
    }

    /// Where a key was written; for one that was not, where the table begins.
    pub(super) fn origin_of(&self, key: &str) -> Origin {
        self.entries.get(key).map_or(&self.origin, |node| &node.origin).clone()
    }

    /// Notes that something is wrong with the table itself.
    pub(super) fn fault_here(&mut self, problem: impl Into<String>) {
        self.faults.at(&self.origin, self.path.clone(), problem);
    }

    /// Takes a string.
    pub(super) fn string(&mut self, key: &'static str) -> Option<(String, Origin)> {
        let node = self.take(key)?;
        match node.value {
            Value::String(text) => Some((text, node.origin)),
            other => {
                self.fault(&node.origin, key, format!("is {}; accepted: a string", other.kind()));
                None
            }
        }
    }

    /// Takes an integer from a range.
    pub(super) fn integer(&mut self, key: &'static str, range: RangeInclusive<i64>) -> Option<i64> {
        let node = self.take(key)?;
        let accepted = format!("accepted: an integer from {} to {}", range.start(), range.end());
        match node.value {
            Value::Integer(number) if range.contains(&number) => return Some(number),
            Value::Integer(number) => self.fault(&node.origin, key, format!("{number} is out of range; {accepted}")),
            other => self.fault(&node.origin, key, format!("is {}; {accepted}", other.kind())),
        }
        None
    }

    /// Takes a boolean.
    pub(super) fn boolean(&mut self, key: &'static str) -> Option<bool> {
        let node = self.take(key)?;
        match node.value {
            Value::Boolean(boolean) => Some(boolean),
            other => {
                self.fault(&node.origin, key, format!("is {}; accepted: true or false", other.kind()));
                None
            }
        }
    }

    /// Takes a list of strings and has each checked; `None` when any is wrong.
    pub(super) fn list<T>(&mut self, key: &'static str, check: impl Fn(&str) -> Result<T, String>) -> Option<Vec<T>> {
        let node = self.take(key)?;
        let Value::List(items) = node.value else {
            self.fault(&node.origin, key, format!("is {}; accepted: an array of strings", node.value.kind()));
            return None;
        };
        let wanted = items.len();
        let mut list = Vec::with_capacity(wanted);
        for item in items {
            let checked = match &item.value {
                Value::String(text) => check(text),
                other => Err(format!("has {} in it; accepted: an array of strings", other.kind())),
            };
            match checked {
                Ok(value) => list.push(value),
                Err(problem) => self.fault(&item.origin, key, problem),
            }
        }
        (list.len() == wanted).then_some(list)
    }

    /// Takes a string that means something; the type's error says what is accepted.
    pub(super) fn parsed<T: FromStr<Err: ToString>>(&mut self, key: &'static str) -> Option<T> {
        self.checked(key, |text| text.parse().map_err(|error: T::Err| error.to_string()))
    }

    /// Takes an absolute path.
    pub(super) fn absolute_path(&mut self, key: &'static str) -> Option<PathBuf> {
        self.checked(key, absolute_path)
    }

    /// Takes a string and has it checked.
    pub(super) fn checked<T>(&mut self, key: &'static str, check: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let (text, origin) = self.string(key)?;
        match check(&text) {
            Ok(value) => Some(value),
            Err(problem) => {
                self.fault(&origin, key, problem);
                None
            }
        }
    }

    /// Notes every key that nobody asked for.
    pub(super) fn finish(mut self) {
        let accepted = self.known.join(", ");
        for (key, node) in std::mem::take(&mut self.entries) {
            self.fault(&node.origin, &key, format!("is not a known key; accepted here: {accepted}"));
        }
    }
}

/// A path that means the same wherever the daemon runs.
pub(super) fn absolute_path(text: &str) -> Result<PathBuf, String> {
    let path = Path::new(text);
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain || path.parent().is_none() || text.bytes().any(|byte| byte.is_ascii_control()) {
        return Err(format!("{text:?} is not an absolute path; accepted: a path that begins with / and has no .. in it"));
    }
    Ok(path.to_path_buf())
}
