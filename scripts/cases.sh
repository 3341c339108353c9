# Tests written in the shell, each a case: sourced by scripts/guest-test.sh and scripts/deb-test.sh.

results=$(realpath -m "${KUASAR_RESULTS:-/dev/null}")
passed=0 failed=0

# it NAME COMMAND...: a test, which passes when the command does. What the command prints last is why not.
it() {
    local name=$1 output status
    shift
    # Not with ||, which would have every failure within the function but the last ignored.
    set +e
    output=$(set -e; "$@" 2>&1)
    status=$?
    set -e
    if [ "$status" -eq 0 ] && [[ $output == SKIP* ]]; then
        say "$output"
        say "SKIP $name: ${output#SKIP }" >>"${KUASAR_SKIP_LOG:-/dev/null}"
    elif [ "$status" -eq 0 ]; then
        passed=$((passed + 1))
        say "PASS $name"
    else
        failed=$((failed + 1))
        say "FAIL $name: $output"
        [ "$results" = /dev/null ] || say "FAIL $name: $(tail -n 1 <<<"$output")" >>"$results"
    fi
}

# Says what came of them, and fails if one failed.
sum_up() {
    [ "$results" = /dev/null ] || say "PASSED $passed" >>"$results"
    say "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}
