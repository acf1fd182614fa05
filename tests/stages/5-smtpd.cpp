// Stage 5 of 5, smtpd: SMTPServer takes over the session; what becomes of a message is all that is left.
// Usage: 5-smtpd [PORT]; without one it is 8025, and 0 takes any port that is free. Try it: nc -C 127.0.0.1 8025
#include "smtpd.hpp"

// SMTPServer listens, and makes an SMTPChannel of each client: the Session of stage 4, with the rest of RFC 5321. It
// knows EHLO, RSET, HELP and VRFY, reads addresses, and bounds sizes, recipients and idle time (smtpd::options).
struct Server : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;

    // A message is complete. Its lines end with \n here, and its dots are gone. What is returned is the reply: nothing
    // stands for "250 OK". What is thrown is logged, the client gets 451, and the session goes on.
    std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options&) override {
        log_info(asyncore::repr(mailfrom));
        for (const auto& address : rcpttos) log_info(asyncore::repr(address));
        log_info(asyncore::repr(data));
        return std::nullopt;
    }
};

int main(int argc, char** argv) {
    Server server({"127.0.0.1", argc > 1 ? std::stoi(argv[1]) : 8025}, {});   // {}: mail is not passed on to a server
    server.log_info("listening on " + server.socket->getsockname().str());
    asyncore::loop();   // until nothing is left in the map; the listener stays in it
}

// Question: process_message() replies at once. What if the reply must come from another server, which takes a minute,
// while the loop serves the other clients? "One message through PureProxy" in tests/READING.md answers it.
