#!/usr/bin/env bash
# Runs one stage of the tests and notes how it went: scripts/stage.sh NAME COMMAND...
#
# What the command prints goes to the terminal and to target/results/NAME.log. Its result goes to target/results/NAME.txt:
#   PASSED n         FAIL name: why         SKIP name: what was missing         SECONDS n
#   WHY line         for the summary, of what the log says of failures
# The command may write PASSED, FAIL and SKIP lines itself, into $KUASAR_RESULTS; otherwise libtest's closing lines are
# counted, and where there are none, the stage as such.
. "$(dirname "$0")/lib.sh"

name=$1
shift
results=$target/results
mkdir -p "$results"
log=$results/$name.log result=$results/$name.txt
KUASAR_RESULTS=$(realpath "$results")/$name.own
KUASAR_SKIP_LOG=$(realpath "$results")/$name.skips
export KUASAR_RESULTS KUASAR_SKIP_LOG
rm -f "$log" "$result" "$KUASAR_RESULTS" "$KUASAR_SKIP_LOG"
touch "$KUASAR_SKIP_LOG"

say "== $name"
status=0
SECONDS=0
timeout --foreground --kill-after=30 "${STAGE_TIMEOUT:-1500}" "$@" > >(tee "$log") 2>&1 || status=$?
seconds=$SECONDS
# tee may still have the last lines.
wait

skips=$(sort -u "$KUASAR_SKIP_LOG" | grep -c '^SKIP ' || true)
{
    if [ -s "$KUASAR_RESULTS" ]; then
        cat "$KUASAR_RESULTS"
        sort -u "$KUASAR_SKIP_LOG"
    elif grep -q '^test result: ' "$log"; then
        # libtest counts a test that skipped itself as passed.
        passed=$(awk '/^test result: / { n += $4 } END { print n }' "$log")
        say "PASSED $((passed - skips))"
        awk '/^test .* \.\.\. FAILED$/ { print "FAIL " $2 ": see '"$log"'" }' "$log"
        awk '/^test .* \.\.\. ignored/ { print "SKIP " $2 ": ignored" }' "$log"
        sort -u "$KUASAR_SKIP_LOG"
    elif [ "$skips" -gt 0 ]; then
        sort -u "$KUASAR_SKIP_LOG"
    elif [ "$status" -eq 0 ]; then
        say "PASSED 1"
    fi
} >"$result"
if [ "$status" -ne 0 ] && ! grep -q '^FAIL ' "$result"; then
    case $status in
    124 | 137) say "FAIL $name: not done after ${STAGE_TIMEOUT:-1500} s, see $log" ;;
    *) say "FAIL $name: exit status $status, see $log" ;;
    esac >>"$result"
fi
if grep -q '^FAIL ' "$result"; then
    # What libtest prints of each failure, or else the end.
    awk '
        /^---- .* ----$/ { left = 12 }
        /^failures:$/ { left = 0 }
        left > 0 && NF { print; left--; found = 1 }
        END { exit !found }
    ' "$log" >"$result.why" || tail -n 12 "$log" >"$result.why"
    cut -c 1-400 "$result.why" | sed 's/^/WHY /' >>"$result"
    rm "$result.why"
fi
say "SECONDS $seconds" >>"$result"
rm -f "$KUASAR_RESULTS" "$KUASAR_SKIP_LOG"
! grep -q '^FAIL ' "$result"
