#!/bin/sh
# Runs CPython's own smtpd again and checks all that is on file about it, and the names.
# Exit status: 0, 1 when anything differs, 77 (skip) without a Python 3.11 that has smtpd.
#
#     check_reference.sh [PYTHON]        /usr/bin/python3 unless given

python=${1:-/usr/bin/python3}
here=$(dirname "$0")
probe='import sys, warnings; warnings.simplefilter("ignore"); import smtpd; sys.exit(sys.version_info[:2] != (3, 11))'

if ! "$python" -c "$probe" 2>/dev/null; then
    echo "skipped: $python is not a Python 3.11 with smtpd"
    exit 77
fi

status=0
"$python" -B "$here/record.py" --check || status=1
"$python" -B "$here/addresses.py" --check || status=1
"$python" -B "$here/names.py" || status=1
exit $status
