//! What the kernel and the C library offer and no crate wraps.
#![allow(unsafe_code)]

/// Settings for glibc's allocator (Memory Allocation Tunables in its manual) that suit a daemon which is idle most of the time.
///
/// One arena instead of one per thread: what another thread freed is never given back by those. No cache of freed pieces per
/// thread: each piece in one keeps its page in the heap. Measured after fifty pods have come and gone, the heap is half as large.
#[cfg(target_env = "gnu")]
const TUNABLES: &str = "glibc.malloc.arena_max=1:glibc.malloc.tcache_count=0";

/// Makes the allocator frugal: glibc reads these settings only when a program starts, so the program starts itself once more, as
/// the same process. Does nothing where the environment has settings already, and with other allocators.
///
/// To be called first in `main`, while there is one thread.
pub fn tune_allocator() {
    #[cfg(target_env = "gnu")]
    {
        use std::{env, os::unix::process::CommandExt, process::Command};

        const VARIABLE: &str = "GLIBC_TUNABLES";
        match env::var_os(VARIABLE) {
            // Meant for us and not for the programs we start.
            // SAFETY: no other thread exists that could read the environment at the same time.
            Some(set) if set == TUNABLES => unsafe { env::remove_var(VARIABLE) },
            Some(_) => {}
            None => {
                let mut args = env::args_os();
                let (Ok(program), Some(name)) = (env::current_exe(), args.next()) else { return };
                // Returns only when that fails, and then it runs on as it is.
                let _ = Command::new(program).arg0(name).args(args).env(VARIABLE, TUNABLES).exec();
            }
        }
    }
}

/// Gives memory that is free inside glibc's heap back to the kernel. Creating a container parses documents of some hundred
/// kilobytes; what lives on from that keeps the heap's end where it is, and the holes below it would stay resident.
pub fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    {
        // SAFETY: malloc_trim takes the allocator's own locks and touches free memory only.
        // Whether it found any is of no interest.
        unsafe { libc::malloc_trim(0) };
    }
}
