//! PID 1 of a microVM.

#[allow(dead_code)]
mod net;

fn main() {}
