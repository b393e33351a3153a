#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Run test programs one after another: exit 0 passes, 77 skips (its output says why), else fails.
# One that hangs fails with exit 124.
failed=0
for program in "$@"; do
    name=$(basename "$program" .test)
    output=$(timeout 300 "$program" 2>&1)
    status=$?
    case $status in
    0) echo "pass  $name" ;;
    77) echo "skip  $name: $output" ;;
    *)
        echo "FAIL  $name (exit $status)"
        echo "$output"
        failed=1
        ;;
    esac
done
exit $failed
