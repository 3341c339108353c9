//! Tests as root, in network namespaces of their own.
