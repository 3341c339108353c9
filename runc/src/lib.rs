//! Containers as processes on this kernel, through an OCI runtime.
