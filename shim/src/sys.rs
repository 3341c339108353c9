//! What the kernel and the C library offer and no crate wraps.
#![allow(unsafe_code)]

/// Limits glibc's allocator to one arena. By default each thread gets one of its own, and none gives memory back that another
/// thread freed: a daemon with few threads that are mostly idle loses more by that than it gains. Other allocators need nothing.
///
/// To be called before the first thread is started.
pub fn limit_arenas() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: mallopt takes two integers and only sets a parameter of the allocator.
        // It returns 0 for a parameter it does not know, and the default is then as good as it gets.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    }
}
