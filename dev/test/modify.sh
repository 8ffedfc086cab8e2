#!/bin/sh
# Do the worked changes of doc/modify.md still fit, and pass the tests? Each diff is applied to a
# copy of the tree, and `make test` run there. Without names, all of doc/modify.
#     sh dev/test/modify.sh [--double] [NAME ...]      --double: only the tests in double, a third
set -eu
cd "$(dirname "$0")/../.."
tests='make -s test'
[ "${1-}" != --double ] || { tests='make -s test_mla_double && ./test_mla_double'; shift; }
[ $# -gt 0 ] || set -- doc/modify/*.diff
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'exit 1' HUP INT TERM
status=0
for name; do
    name=$(basename "$name" .diff)
    diff=$PWD/doc/modify/$name.diff tree=$work/$name
    [ -f "$diff" ] || { echo "$name: no doc/modify/$name.diff, see doc/modify.md" >&2; exit 1; }
    mkdir "$tree"
    if [ -e .git ]; then git ls-files | tar -cf - -T - | tar -xf - -C "$tree"
    else for f in *; do case $f in runs|data) ;; *) cp -R "$f" "$tree" ;; esac; done; fi
    if (cd "$tree" && patch -p1 -s -F0 <"$diff" && eval "$tests") >"$work/said" 2>&1; then
        echo "$name: $(tail -n 1 "$work/said")"
    else
        echo "$name: failed: $(tail -n 1 "$work/said")"
        cat "$work/said" >&2
        status=1
    fi
    rm -rf "$tree"
done
exit $status
