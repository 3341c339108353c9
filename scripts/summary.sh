#!/usr/bin/env bash
# Says what the stages came to: scripts/summary.sh NAME...; fails when something failed.
. "$(dirname "$0")/lib.sh"

files=()
for name in "$@"; do files+=("$target/results/$name.txt"); done

say
say "Summary"
awk '
    FNR == 1 { file = FILENAME; sub(/.*\//, "", file); sub(/\.txt$/, "", file); order[++files] = file }
    /^PASSED / { passed[file] += $2; all_passed += $2 }
    /^FAIL / { failed[file]++; all_failed++; failures[++n_failures] = file ": " substr($0, 6) }
    /^SKIP / {
        skipped[file]++; all_skipped++
        what = substr($0, 6); colon = index(what, ": ")
        reason = file ": " (colon ? substr(what, colon + 2) : what)
        if (!(reason in reasons)) reason_order[++n_reasons] = reason
        reasons[reason]++
        example[reason] = colon ? substr(what, 1, colon - 1) : what
    }
    /^WHY / { why[++n_why] = file ": " substr($0, 5) }
    /^SECONDS / { seconds[file] = $2 }
    END {
        for (i = 1; i <= files; i++) {
            file = order[i]
            printf "  %-24s %4d passed %3d failed %3d skipped  %4d s\n", file, passed[file], failed[file], skipped[file], seconds[file]
        }
        if (n_reasons) print "Skipped"
        for (i = 1; i <= n_reasons; i++) {
            reason = reason_order[i]
            if (reasons[reason] > 1) printf "  %s (%d of them)\n", reason, reasons[reason]
            else printf "  %s [%s]\n", reason, example[reason]
        }
        if (n_why) print "What the logs say of failures"
        for (i = 1; i <= n_why; i++) print "  " why[i]
        if (n_failures) print "Failed"
        for (i = 1; i <= n_failures; i++) print "  " failures[i]
        printf "%d passed, %d failed, %d skipped\n", all_passed, all_failed, all_skipped
        exit all_failed > 0
    }
' "${files[@]}"
