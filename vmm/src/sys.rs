//! What no library in the tree wraps. The one module of this crate with unsafe code.
#![allow(unsafe_code)]

/// The processor's time stamp counter.
#[cfg(target_arch = "x86_64")]
pub(crate) fn time_stamp() -> u64 {
    // SAFETY: every x86-64 processor has the instruction, Linux lets user space use it, and it touches no memory.
    unsafe { std::arch::x86_64::_rdtsc() }
}
