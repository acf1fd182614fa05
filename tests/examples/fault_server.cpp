// A server that fails as it is told, to try a client in any language: does it come again after 451, and only then? It
// prints the conversations, with the number of the connection, and what the client does wrong. Any login does (AUTH
// PLAIN, LOGIN, CRAM-MD5).
//
// Usage: fault_server [PORT] [STEP[:ADDRESS]=[COUNT=]ACTION[,ACTION...]...]
//
//     fault_server                                    RCPT=2=451: two recipients are put off, then all is well
//     fault_server 2525 RCPT:bob@*=550 DATA=25%=drop greeting=delay:2s ".=1=452 4.3.1 disk full"
//
// STEP is a verb, greeting, "." (the end of a message), AUTH+ (a line after AUTH), or "*". What COUNT and ACTION are
// stands in fixture.hpp, whose faults these are, at parse_faults(). "none" instead of faults: there are none.
// Compile with: c++ -std=c++17 -I. tests/examples/fault_server.cpp smtpd.cpp asyncore.cpp -pthread -o fault_server
#include <cstdlib>
#include <iostream>

#include "fixture.hpp"

int main(int argc, char** argv) {
    std::vector<std::string> words(argv + 1, argv + argc);
    mail_fixture::options with;
    with.where.port = 1025;
    with.auth = {"PLAIN", "LOGIN", "CRAM-MD5"};
    with.log = [](int connection, const std::string& line) { std::cout << connection << ' ' << line << std::endl; };
    try {
        if (!words.empty() && words[0].find_first_not_of("0123456789") == std::string::npos) {
            with.where = {"127.0.0.1", static_cast<int>(fixture::number(words[0]))};
            words.erase(words.begin());
        }
        mail_fixture mail(with);
        for (const std::string& it : words.empty() ? std::vector<std::string>{"RCPT=2=451 4.3.0 try again"} : words)
            if (it != "none") mail.faults(it);
        std::cout << "listening on " << mail.address().str() << std::endl;
        for (;;)   // until a signal ends it
            if (mail.wait_for(1, std::chrono::hours(1))) mail.clear();
    } catch (const std::exception& error) {
        std::cerr << "fault_server: " << error.what() << '\n';
        return 1;
    }
}
