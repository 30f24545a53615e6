# Sourced by the other scripts: makes .venv where it is missing and installs this package with the extras in $1.
python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or later is needed" >&2; exit 1; }
[ -x .venv/bin/python ] || python3 -m venv .venv
stamp=.venv/.installed-${1:-core}-$(cksum < pyproject.toml | tr ' ' -)
if [ ! -e "$stamp" ]; then
    echo "Installing into .venv (once) ..."
    .venv/bin/python -m pip install --disable-pip-version-check torch==2.13.0
    .venv/bin/python -m pip install --disable-pip-version-check --editable ".${1:+[$1]}"
    touch "$stamp"
fi
