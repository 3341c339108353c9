#!/usr/bin/env bash
# Fuzzes every target (a test called fuzz_…) of the crates on both sides of a guest's boundary: scripts/fuzz.sh [name]
#
# libFuzzer runs each for FUZZ_SECONDS (60), guided by coverage; `cargo test` runs the same targets for a second with random input.
# What is found lies in __fuzz__ beside the target's source, and fails `cargo test` until it is repaired.
. "$(dirname "$0")/lib.sh"

bolero=0.13.5
crates=(kuasar-guest-protocol kuasar-guest-agent kuasar-vmm)
seconds=${FUZZ_SECONDS:-60}
wanted=${1:-}

have g++ || fail "libFuzzer is built from C++, and there is no g++: apt-get install g++"
tools=$cache/cargo-bolero-$bolero
[ -x "$tools/bin/cargo-bolero" ] ||
    cargo install --quiet --locked --root "$tools" --no-default-features --features libfuzzer --version "$bolero" cargo-bolero
export PATH=$tools/bin:$PATH

ran=0
for crate in "${crates[@]}"; do
    tests=$(cargo test --quiet --locked -p "$crate" --lib -- --list | sed -n 's/: test$//p' | grep '::fuzz_' | grep -F -- "$wanted" || true)
    for test in $tests; do
        say "$crate $test, $seconds s"
        # The compiler's coverage is an unstable option. Memory safety is the compiler's part: no sanitizer. The crate's programs are
        # built too, without libFuzzer, so that symbols of its coverage are missing in them; they are not run.
        RUSTFLAGS="-Clink-arg=-Wl,--unresolved-symbols=ignore-all" cargo bolero test --rustc-bootstrap --sanitizer NONE --target-dir "$(realpath -m "$target")/fuzz" -p "$crate" -T "${seconds}s" "$test"
        ran=$((ran + 1))
    done
done
[ "$ran" -gt 0 ] || fail "no fuzz target is called ${wanted:-fuzz_…}"
say "$ran targets, nothing found"
