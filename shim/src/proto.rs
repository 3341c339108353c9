//! Messages and services generated from `proto/`.
#![allow(missing_docs, unreachable_pub, clippy::all)]

/// `containerd.*`; the generated code finds sibling packages through these paths.
pub mod containerd {
    pub mod services {
        pub mod containers {
            pub mod v1 {
                tonic::include_proto!("containerd.services.containers.v1");
            }
        }
        pub mod sandbox {
            pub mod v1 {
                tonic::include_proto!("containerd.services.sandbox.v1");
            }
        }
        pub mod streaming {
            pub mod v1 {
                tonic::include_proto!("containerd.services.streaming.v1");
            }
        }
        pub mod tasks {
            pub mod v1 {
                tonic::include_proto!("containerd.services.tasks.v1");
            }
        }
    }
    pub mod types {
        tonic::include_proto!("containerd.types");
        pub mod transfer {
            tonic::include_proto!("containerd.types.transfer");
        }
    }
}

/// `runtimeoptions.v1`: what containerd's runtime table becomes for a runtime type it does not know.
pub mod runtimeoptions {
    tonic::include_proto!("runtimeoptions.v1");
}

/// `kuasar.v1`: the daemon's own service.
pub mod admin {
    tonic::include_proto!("kuasar.v1");
}

pub use containerd::{
    services::{containers::v1 as containers, sandbox::v1 as sandbox, tasks::v1 as tasks},
    types,
};
