#!/bin/sh
# Tests the stages and their checks: each stage passes its own, fails those of the next one, and there is a mistake for
# each check that it finds. No stage has 70 lines, and each ends with a question.
# Usage: tests/stages/test.sh; CXX, CXXFLAGS and BUILD as in check.sh.
set -eu
cd "$(dirname "$0")"
BUILD=${BUILD:-$(pwd)/../bin/stages}
export BUILD
mkdir -p "$BUILD"
rm -f "$BUILD/passed" "$BUILD/found"
faults=0

fault() {
    echo "FAILED: $*"
    cat "$BUILD/log"
    faults=$((faults + 1))
}

# passes N FILE
passes() {
    sh ./check.sh "$1" "$2" >"$BUILD/log" 2>&1 || fault "$2 does not pass the checks of stage $1"
    ! grep -q warning: "$BUILD/log" || fault "$2 has warnings"
    sed -n "s/^ok: /$1 /p" "$BUILD/log" >>"$BUILD/passed"
}

# fails N FILE CHECK...: and it is said why.
fails() {
    checks=$1 program=$2
    shift 2
    ! CHECK_LIMIT=2 sh ./check.sh "$checks" "$program" >"$BUILD/log" 2>&1 ||
        fault "$program passes the checks of stage $checks"
    for name in "$@"; do
        grep -q "^MISSING: $name: ." "$BUILD/log" || fault "$program: not found to be missing: $name"
        echo "$checks $name" >>"$BUILD/found"
    done
}

# spoilt N FILE SED CHECK...: the stage with a mistake.
spoilt() {
    sed "$3" "$2" >"$BUILD/spoilt.cpp"
    ! cmp -s "$2" "$BUILD/spoilt.cpp" || { echo "$3" >"$BUILD/log"; fault "nothing to spoil in $2"; }
    checks=$1
    shift 3
    fails "$checks" "$BUILD/spoilt.cpp" "$@"
}

before=
for file in 1-echo.cpp 2-lines.cpp 3-greeting.cpp 4-mail.cpp 5-smtpd.cpp; do
    stage=${file%%-*}
    passes "$stage" "$file"
    [ "$(wc -l <"$file")" -lt 70 ] || fault "$file has 70 lines or more"
    tail -2 "$file" | grep -q '^// Question: .*' || fault "$file ends without a question"
    case $stage in
    2) fails 2 "$before" "A line that comes in two packets is one line"
        grep -q "one line: sent 'he', expected nothing yet, heard 'he'" "$BUILD/log" || fault "it is not said why" ;;
    3) fails 3 "$before" "The server speaks first" ;;
    4) fails 4 "$before" "MAIL, RCPT, DATA and a text with a dot at its end are a message" \
        "RCPT has to wait for MAIL" "DATA has to wait for RCPT" "A second MAIL has to wait for the end of the first" ;;
    5) fails 5 "$before" "EHLO is answered with what the server can do, SIZE among it" "MAIL has to wait for HELO" \
        "A sender that is no address is refused" "A message that will be too large is refused at once" \
        "RSET forgets the sender" ;;
    esac
    before=$file
done

one=1-echo.cpp two=2-lines.cpp three=3-greeting.cpp four=4-mail.cpp five=5-smtpd.cpp
spoilt 1 $one '/log_info/d' "The program prints the port that it listens on"
spoilt 1 $one 's/waiting += recv/recv/' "What a client sends comes back"
spoilt 1 $one 's/std::string waiting/inline static &/' "Two clients are served at once, each with its own bytes"
spoilt 1 $one 's/{ close(); }/{ throw asyncore::ExitNow(); }/' "A client that leaves takes no other along"
spoilt 1 $one 's/{ close(); }/{}/' "A client whose connection has ended is let go"
spoilt 1 $one 's/waiting += recv/waiting = recv/' \
    "Many bytes come back, all of them and in their order"
spoilt 1 $one 's/waiting.size() < 65536/true/' "A client that never reads does not fill the memory"
spoilt 2 $two 's/ + "\\r\\n"/ + "\\n"/' "A line comes back, with its end"
spoilt 2 $two 's/set_terminator("\\r\\n")/set_terminator("\\r")/' "The end of a line may come in two packets"
spoilt 2 $two 's/std::exchange(line, {})/line/' "Two lines in one packet are two lines"
spoilt 2 $two 's/std::string line/inline static &/' "Each client has a line of its own"
spoilt 2 $two 's/{ push/{ if (!line.empty()) push/' "An empty line is a line"
spoilt 2 $two '/close()/d' "A line that never ends does not fill the memory"
spoilt 3 $three 's/arg.empty()/!arg.empty()/' "HELO with a name is taken" "HELO without a name is not"
spoilt 3 $three '/for (char& c : verb)/d' "A verb may be written in small letters"
spoilt 3 $three '/NOOP/d' "NOOP does nothing, and is taken"
spoilt 3 $three 's/500 Error/250 OK/' "An unknown verb is refused, and the session goes on"
spoilt 3 $three 's/std::exchange(line, {})/line/' "Commands that come in one packet get their replies in their order"
spoilt 3 $three '/close_when_done()/d' "After QUIT come a last reply and the end of the connection"
spoilt 3 $three 's/close_when_done()/throw asyncore::ExitNow()/' "QUIT ends no other session"
spoilt 4 $four '/for (const auto& address/d' "The sender, the recipients and the text are printed"
spoilt 4 $four '/text.erase(at + 2, 1)/d' "The dot that a client puts before a dot is taken away"
spoilt 4 $four '/unread/d; s/text.erase(0, 2)/text/' "The first line of a text is no different" \
    "A dot at once is the end of an empty text"
spoilt 4 $four 's/set_terminator("\\r\\n\.\\r\\n")/set_terminator("\\r\\n")/' \
    "A line of the text that looks like a command is text" "The end of a text may come byte by byte"
spoilt 4 $four 's/std::exchange(envelope, {})/envelope/' "After a message the next one begins anew"
spoilt 5 $five 's/const auto& address : rcpttos/const auto\& address : {mailfrom}/' \
    "The sender, the recipients and the text are printed"

# No check of a stage is there that has never found anything; those of the stages before have been seen to.
cut -d' ' -f2- "$BUILD/found" | sort -u >"$BUILD/found.names"
cut -d' ' -f2- "$BUILD/passed" | sort -u | while read -r name; do
    grep -qxF "$name" "$BUILD/found.names" || echo "$name"
done >"$BUILD/log"
[ ! -s "$BUILD/log" ] || fault "no mistake is made for these checks:"
echo "5 stages, $(sort -u "$BUILD/passed" | wc -l) checks, $(wc -l <"$BUILD/found") mistakes found; $faults faults"
[ $faults -eq 0 ]
