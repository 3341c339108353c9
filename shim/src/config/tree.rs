//! What was written: TOML as a tree in which every value knows its file and line.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use toml::de::{DeTable, DeValue};

use super::fault::{Faults, Origin};

/// A value and where it was written.
#[derive(Clone, Debug)]
pub(super) struct Node {
    pub(super) value: Value,
    pub(super) origin: Origin,
}

/// The part of TOML that the configuration uses; the rest is known by name only, to say that it does not belong.
#[derive(Clone, Debug)]
pub(super) enum Value {
    Table(BTreeMap<String, Node>),
    String(String),
    Integer(i64),
    Boolean(bool),
    List(Vec<Node>),
    Other(&'static str),
}

impl Value {
    /// What it is called in a fault.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Table(_) => "a table",
            Self::String(_) => "a string",
            Self::Integer(_) => "an integer",
            Self::Boolean(_) => "a boolean",
            Self::List(_) => "an array",
            Self::Other(kind) => kind,
        }
    }
}

impl Node {
    /// What no file says anything about.
    pub(super) fn empty() -> Self {
        Self { value: Value::Table(BTreeMap::new()), origin: Origin { file: Path::new("").into(), line: 1 } }
    }

    /// Lays `over` on top: tables are united, anything else is replaced.
    pub(super) fn merge(&mut self, over: Self) {
        match (&mut self.value, over.value) {
            (Value::Table(mine), Value::Table(theirs)) => {
                for (key, node) in theirs {
                    match mine.entry(key) {
                        std::collections::btree_map::Entry::Vacant(entry) => {
                            entry.insert(node);
                        }
                        std::collections::btree_map::Entry::Occupied(mut entry) => entry.get_mut().merge(node),
                    }
                }
            }
            (_, value) => *self = Self { value, origin: over.origin },
        }
    }
}

/// The tree of one text. Whatever does not parse is noted, line by line, and the rest is still there to be checked.
pub(super) fn parse(file: &Path, text: &str, faults: &mut Faults) -> Node {
    let lines = std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect();
    let reader = Reader { file: file.into(), lines };
    let (table, errors) = DeTable::parse_recoverable(text);
    for error in errors {
        let start = error.span().map_or(0, |span| span.start);
        faults.at(&reader.origin(start), "", format!("not valid TOML: {}", error.message().replace('\n', ", ")));
    }
    reader.table(table.get_ref(), 0)
}

struct Reader {
    file: Arc<Path>,
    /// Where each line begins.
    lines: Vec<usize>,
}

impl Reader {
    fn origin(&self, offset: usize) -> Origin {
        Origin { file: Arc::clone(&self.file), line: self.lines.partition_point(|start| *start <= offset) }
    }

    fn table(&self, table: &DeTable<'_>, offset: usize) -> Node {
        let nodes = table.iter().map(|(key, value)| {
            // A key says better than its value where a table begins.
            let start = key.span().start;
            (key.get_ref().to_string(), self.node(value.get_ref(), start))
        });
        Node { value: Value::Table(nodes.collect()), origin: self.origin(offset) }
    }

    fn node(&self, value: &DeValue<'_>, offset: usize) -> Node {
        let value = match value {
            DeValue::Table(table) => return self.table(table, offset),
            DeValue::String(text) => Value::String(text.to_string()),
            DeValue::Integer(integer) => i64::from_str_radix(integer.as_str(), integer.radix())
                .map_or(Value::Other("an integer beyond 64 bits"), Value::Integer),
            DeValue::Float(_) => Value::Other("a float"),
            DeValue::Boolean(boolean) => Value::Boolean(*boolean),
            DeValue::Datetime(_) => Value::Other("a date"),
            DeValue::Array(list) => Value::List(list.iter().map(|item| self.node(item.get_ref(), item.span().start)).collect()),
        };
        Node { value, origin: self.origin(offset) }
    }
}
