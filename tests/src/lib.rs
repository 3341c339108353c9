//! Harness, end-to-end tests, conformance, demo and benchmark.
