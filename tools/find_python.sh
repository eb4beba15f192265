#!/bin/sh
# Prints the path of a Python this project runs on, or says what was found and what to do, and fails.
# PYTHON names one; without it, those on PATH and pyenv's are tried, the newest fitting one first.
set -u

found=
try() {  # prints $1 if it fits and ends the search; else remembers what is wrong with it
    answer=$("$1" -c 'import os, sys
print("%d.%d.%d %s" % (sys.version_info[:3] + (os.path.realpath(sys.executable),)))' \
             2>/dev/null) || return
    version=${answer%% *} path=${answer#* }
    case "$version" in
        3.8.* | 3.9.* | 3.10.* | 3.11.*)
            if "$1" -c 'import ensurepip, venv' 2>/dev/null; then
                printf '%s\n' "$1"
                exit
            fi
            problem="fits, but has no venv module: sudo apt-get install python${version%.*}-venv" ;;
        *) problem="does not fit" ;;
    esac
    line="  $version at $path: $problem"
    case "$found" in
        *"$line"*) ;;
        *) found="$found$line
" ;;
    esac
}

if [ -n "${PYTHON:-}" ]; then
    case "$PYTHON" in
        '~'/*) PYTHON="$HOME/${PYTHON#'~'/}" ;;  # a shell leaves the ~ of make PYTHON=~/… alone
    esac
    try "$PYTHON"
    [ -n "$found" ] || found="  $PYTHON: not a Python
"
    searched="PYTHON=$PYTHON is none:"
else
    for name in python3.11 python3.10 python3.9 python3.8 python3 python; do
        IFS=:
        for folder in $PATH; do
            [ ! -x "$folder/$name" ] || try "$folder/$name"
        done
        unset IFS
        for python in "${PYENV_ROOT:-$HOME/.pyenv}"/versions/*/bin/"$name"; do
            [ ! -x "$python" ] || try "$python"
        done
    done
    searched="Found on PATH and in pyenv:"
    [ -n "$found" ] || found="  none
"
fi

cat >&2 <<END
mxsimmim needs Python 3.8, 3.9, 3.10 or 3.11 with its venv module: MXNet 1.9.1 needs numpy < 1.24, which newer Pythons
do not have. $searched
$found
Install one in whichever way suits this machine:
  sudo apt-get install python3.11 python3.11-venv     (Debian 12; elsewhere the version your system has)
  pyenv install 3.11
  conda create -y -p ~/python3.11 python=3.11         (then PYTHON=~/python3.11/bin/python)
and run make again, or name it: make demo PYTHON=/path/to/python3.11
END
exit 1
