//! What an id means to `kuasarctl inspect`: a sandbox that is here, or one that could not be started and is gone.

use std::collections::BTreeMap;

use kuasar_sandboxers::{
    Error, Result,
    failures::Failure,
    handle::SandboxStatus,
    id::{Namespace, SandboxId},
};
use serde::Serialize;

/// A sandbox: as it is, its failed starts and those of its containers, or both.
#[derive(Debug, Serialize)]
pub(crate) struct Subject {
    /// `None` when it is gone.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    status: Option<SandboxStatus>,
    /// Oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    failures: Vec<Failure>,
}

/// The one sandbox that is meant by an id of it or of a container in it, or by the beginning of one. `failures` are those of every
/// namespace; `namespace` (empty: any) says which count.
///
/// # Errors
/// [`Error::NotFound`]; [`Error::Invalid`] when the id fits several.
pub(crate) fn only(sandboxes: Vec<SandboxStatus>, failures: Vec<Failure>, namespace: &str, id: &str) -> Result<Subject> {
    if id.is_empty() {
        return Err(Error::invalid("id", "it is empty; give the id of a sandbox or container, or the beginning of one"));
    }
    let wanted = |failure: &Failure| namespace.is_empty() || failure.namespace.as_str() == namespace;
    let mut subjects = subjects(sandboxes, failures.into_iter().filter(wanted));
    // What is here goes before what is gone: a failure of yesterday makes no beginning of an id ambiguous.
    for (whole, here) in [(true, true), (true, false), (false, true), (false, false)] {
        let fits = |candidate: &str| if whole { candidate == id } else { candidate.starts_with(id) };
        let meant = |subject: &Subject| subject.status.is_some() == here && subject.ids().any(fits);
        let mut matching: Vec<usize> = (0..subjects.len()).filter(|index| meant(&subjects[*index])).collect();
        match (matching.pop(), matching.len()) {
            (Some(index), 0) => return Ok(subjects.swap_remove(index)),
            (Some(_), more) => {
                let why = format!("{id:?} fits {} sandboxes; give more of it, or the namespace", more + 1);
                return Err(Error::invalid("id", why));
            }
            (None, _) => {}
        }
    }
    Err(Error::NotFound { kind: "sandbox or container", id: id.into() })
}

/// Every sandbox with its failures.
fn subjects(sandboxes: Vec<SandboxStatus>, failures: impl Iterator<Item = Failure>) -> Vec<Subject> {
    let mut subjects: BTreeMap<(Namespace, SandboxId), Subject> = BTreeMap::new();
    for status in sandboxes {
        let key = (status.spec.namespace.clone(), status.spec.id.clone());
        subjects.insert(key, Subject { status: Some(status), failures: Vec::new() });
    }
    for failure in failures {
        let key = (failure.namespace.clone(), failure.sandbox.clone());
        subjects.entry(key).or_insert_with(|| Subject { status: None, failures: Vec::new() }).failures.push(failure);
    }
    subjects.into_values().collect()
}

impl Subject {
    /// What it is, if it is here.
    pub(crate) fn here(&self) -> Option<&SandboxStatus> {
        self.status.as_ref()
    }

    /// Its id and those of its containers, with those that could not be started.
    fn ids(&self) -> impl Iterator<Item = &str> {
        let here = self.status.iter().flat_map(|status| {
            let containers = status.containers.iter().map(|container| container.id.as_str());
            containers.chain([status.spec.id.as_str()])
        });
        let failed = self.failures.iter().flat_map(|failure| {
            let container = failure.container.as_ref().map(|id| id.as_str());
            container.into_iter().chain([failure.sandbox.as_str()])
        });
        here.chain(failed)
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use kuasar_sandboxers::{Code, fake, lifecycle::SandboxState};
    use serde_json::Value;

    use super::*;

    fn sandbox(id: &str) -> SandboxStatus {
        SandboxStatus {
            spec: fake::spec(id).into(),
            state: SandboxState::Created,
            created_at: SystemTime::UNIX_EPOCH,
            technique: "fake".into(),
            detail: Value::Null,
            containers: Vec::new(),
        }
    }

    fn failure(namespace: &str, sandbox: &str, container: Option<&str>) -> Failure {
        Failure {
            at: SystemTime::UNIX_EPOCH,
            namespace: namespace.parse().unwrap(),
            sandbox: sandbox.parse().unwrap(),
            container: container.map(|id| id.parse().unwrap()),
            operation: "start it".into(),
            code: Code::Internal,
            error: "it failed".into(),
            stages: Vec::new(),
            log: None,
            file: "/f".into(),
        }
    }

    /// Whether the sandbox is here, and whose failures are told.
    fn meant(namespace: &str, id: &str) -> Result<(bool, Vec<String>)> {
        let failures = vec![
            failure("test", "aa1", None),
            failure("test", "aa1", Some("c1")),
            failure("test", "ab2", None),
            failure("other", "ab2", None),
            failure("test", "here", Some("c2")),
        ];
        let found = only(vec![sandbox("here"), sandbox("ab"), sandbox("other")], failures, namespace, id)?;
        let ids = found.failures.iter().map(|failure| failure.container.as_ref().map_or("-".into(), ToString::to_string));
        Ok((found.status.is_some(), ids.collect()))
    }

    #[test]
    fn what_is_gone_is_found_by_its_failures() {
        let strings = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
        for id in ["aa1", "aa", "c1"] {
            assert_eq!(meant("", id).unwrap(), (false, strings(&["-", "c1"])), "{id}");
        }
        for id in ["here", "h", "c2"] {
            assert_eq!(meant("test", id).unwrap(), (true, strings(&["c2"])), "{id}");
        }
        // The whole id goes before the beginning of another, and what is here before what is gone.
        assert_eq!(meant("", "ab").unwrap(), (true, strings(&[])));
        assert_eq!(meant("other", "ab2").unwrap(), (false, strings(&["-"])));
        for (id, code) in [("ab2", Code::InvalidArgument), ("x", Code::NotFound), ("", Code::InvalidArgument)] {
            assert_eq!(meant("", id).unwrap_err().code(), code, "{id}");
        }
    }

    #[test]
    fn a_document_has_what_there_is() {
        let json =
            |id| serde_json::to_value(only(vec![sandbox("p")], vec![failure("test", "q", None)], "", id).unwrap()).unwrap();
        let keys = |value: Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(json("p")), ["spec", "state", "created_at", "technique", "detail", "containers"]);
        assert_eq!(keys(json("q")), ["failures"]);
    }
}
