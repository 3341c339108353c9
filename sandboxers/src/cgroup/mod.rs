//! Control groups: which version the host has, resource use of a group, OOM notification, and removal.

/// Resource use of a control group, in the form of the hierarchy it was read from; containerd has a message for each.
#[derive(Clone, Debug, PartialEq)]
pub enum Stats {
    /// From cgroup v1.
    V1(Box<v1::Stats>),
    /// From cgroup v2.
    V2(Box<v2::Stats>),
}

pub mod v1 {
    //! cgroup v1.

    /// Resource use.
    #[derive(Clone, Debug, Default, PartialEq)]
    pub struct Stats {}
}

pub mod v2 {
    //! cgroup v2.

    /// Resource use.
    #[derive(Clone, Debug, Default, PartialEq)]
    pub struct Stats {}
}
