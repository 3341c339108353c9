//! A BPF program of a network namespace that gives our listeners every TCP connection to a loopback address, whatever its port.
//!
//! The kernel asks it (Linux 5.9, `sk_lookup`) where it would look for a listening socket. In C it would be:
//!
//! ```c
//! if (ctx->protocol == IPPROTO_TCP) {
//!     __u32 key = ctx->family == AF_INET ? 0 : 1;
//!     if (key == 0 ? is_127(ctx->local_ip4) : is_1(ctx->local_ip6))
//!         if ((sk = bpf_map_lookup_elem(&listeners, &key))) {
//!             bpf_sk_assign(ctx, sk, 0);
//!             bpf_sk_release(sk);
//!         }
//! }
//! return SK_PASS;
//! ```
//!
//! Its some thirty instructions are put together here: a compiler for them, and a library to load them, would be far more than they are.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use crate::sys::{self, LinkCreate, MapCreate, ProgramLoad};

/// Numbers of linux/bpf.h.
const MAP_SOCKMAP: u32 = 15;
const PROGRAM_SK_LOOKUP: u32 = 30;
const ATTACH_SK_LOOKUP: u32 = 36;
const MAP_LOOKUP_ELEM: i32 = 1;
const SK_RELEASE: i32 = 86;
const SK_ASSIGN: i32 = 124;
const PSEUDO_MAP_FD: u8 = 1;
const SK_PASS: i32 = 1;

/// Offsets in `struct bpf_sk_lookup`.
const FAMILY: i16 = 8;
const PROTOCOL: i16 = 12;
const LOCAL_IP4: i16 = 40;
const LOCAL_IP6: i16 = 44;

/// Where the key is, on the stack.
const KEY: i16 = -4;

/// Operations, of their class and mode.
const LOAD_WIDE: u8 = 0x18;
const LOAD_WORD: u8 = 0x61;
const STORE_WORD_IMMEDIATE: u8 = 0x62;
const ADD: u8 = 0x07;
const MOVE: u8 = 0xbf;
const MOVE_IMMEDIATE: u8 = 0xb7;
const AND: u8 = 0x57;
const JUMP: u8 = 0x05;
const JUMP_EQUAL: u8 = 0x15;
const JUMP_NOT_EQUAL: u8 = 0x55;
const CALL: u8 = 0x85;
const EXIT: u8 = 0x95;

/// The listener for IPv4 and, where there is IPv6, the one for that. The program is there until the descriptor returned is closed.
pub(super) fn attach(netns: BorrowedFd<'_>, v4: BorrowedFd<'_>, v6: Option<BorrowedFd<'_>>) -> io::Result<OwnedFd> {
    let map = sys::bpf_create(MapCreate { kind: MAP_SOCKMAP, key_size: 4, value_size: 4, max_entries: 2 })?;
    sys::set_socket(map.as_fd(), 0, v4)?;
    if let Some(v6) = v6 {
        sys::set_socket(map.as_fd(), 1, v6)?;
    }
    let program = sys::bpf_create(ProgramLoad::new(
        PROGRAM_SK_LOOKUP,
        ATTACH_SK_LOOKUP,
        &program(map.as_raw_fd())?,
        *b"kuasar_forward\0\0",
    )?)?;
    sys::bpf_create(LinkCreate {
        program: program.as_raw_fd().unsigned_abs(),
        target: netns.as_raw_fd().unsigned_abs(),
        attach_type: ATTACH_SK_LOOKUP,
        flags: 0,
    })
}

/// One instruction: operation, registers, offset, immediate value (linux/bpf.h, `struct bpf_insn`).
fn instruction(operation: u8, to: u8, from: u8, offset: i16, value: i32) -> u64 {
    let registers = if cfg!(target_endian = "big") { to << 4 | from } else { from << 4 | to };
    let [o1, o2] = offset.to_ne_bytes();
    let [v1, v2, v3, v4] = value.to_ne_bytes();
    u64::from_ne_bytes([operation, registers, o1, o2, v1, v2, v3, v4])
}

/// A word in network byte order, as the context has it.
fn network(word: u32) -> i32 {
    i32::from_ne_bytes(word.to_be_bytes())
}

/// Where jumps go.
#[derive(Clone, Copy)]
enum Label {
    Ipv6,
    Assign,
    Pass,
}

/// Instructions, and jumps whose distance is not known yet.
#[derive(Default)]
struct Assembler {
    code: Vec<u64>,
    jumps: Vec<(usize, u8, u8, i32, Label)>,
    labels: [usize; 3],
}

impl Assembler {
    fn emit(&mut self, operation: u8, to: u8, from: u8, offset: i16, value: i32) {
        self.code.push(instruction(operation, to, from, offset, value));
    }

    /// Loads a word of the context into register 2.
    fn load(&mut self, offset: i16) {
        self.emit(LOAD_WORD, 2, 6, offset, 0);
    }

    fn jump(&mut self, operation: u8, register: u8, value: i32, label: Label) {
        self.jumps.push((self.code.len(), operation, register, value, label));
        self.code.push(0);
    }

    fn label(&mut self, label: Label) {
        self.labels[label as usize] = self.code.len();
    }

    fn finish(mut self) -> io::Result<Vec<u64>> {
        for (at, operation, register, value, label) in self.jumps {
            // Every jump is forward.
            let distance = i16::try_from(self.labels[label as usize] - at - 1).map_err(io::Error::other)?;
            self.code[at] = instruction(operation, register, 0, distance, value);
        }
        Ok(self.code)
    }
}

fn program(map: i32) -> io::Result<Vec<u64>> {
    let mut asm = Assembler::default();
    asm.emit(MOVE, 6, 1, 0, 0);
    asm.load(PROTOCOL);
    asm.jump(JUMP_NOT_EQUAL, 2, libc::IPPROTO_TCP, Label::Pass);
    asm.load(FAMILY);
    asm.jump(JUMP_EQUAL, 2, libc::AF_INET6, Label::Ipv6);
    asm.jump(JUMP_NOT_EQUAL, 2, libc::AF_INET, Label::Pass);
    // 127.0.0.0/8.
    asm.emit(STORE_WORD_IMMEDIATE, 10, 0, KEY, 0);
    asm.load(LOCAL_IP4);
    asm.emit(AND, 2, 0, 0, network(0xff00_0000));
    asm.jump(JUMP_NOT_EQUAL, 2, network(0x7f00_0000), Label::Pass);
    asm.jump(JUMP, 0, 0, Label::Assign);
    asm.label(Label::Ipv6);
    // ::1.
    asm.emit(STORE_WORD_IMMEDIATE, 10, 0, KEY, 1);
    for (offset, word) in [(0, 0), (4, 0), (8, 0), (12, 1)] {
        asm.load(LOCAL_IP6 + offset);
        asm.jump(JUMP_NOT_EQUAL, 2, network(word), Label::Pass);
    }
    asm.label(Label::Assign);
    asm.emit(LOAD_WIDE, 1, PSEUDO_MAP_FD, 0, map);
    asm.code.push(0);
    asm.emit(MOVE, 2, 10, 0, 0);
    asm.emit(ADD, 2, 0, 0, i32::from(KEY));
    asm.emit(CALL, 0, 0, 0, MAP_LOOKUP_ELEM);
    asm.jump(JUMP_EQUAL, 0, 0, Label::Pass);
    asm.emit(MOVE, 7, 0, 0, 0);
    asm.emit(MOVE, 1, 6, 0, 0);
    asm.emit(MOVE, 2, 7, 0, 0);
    asm.emit(MOVE_IMMEDIATE, 3, 0, 0, 0);
    asm.emit(CALL, 0, 0, 0, SK_ASSIGN);
    asm.emit(MOVE, 1, 7, 0, 0);
    asm.emit(CALL, 0, 0, 0, SK_RELEASE);
    asm.label(Label::Pass);
    asm.emit(MOVE_IMMEDIATE, 0, 0, 0, SK_PASS);
    asm.emit(EXIT, 0, 0, 0, 0);
    asm.finish()
}
