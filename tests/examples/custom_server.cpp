// A server of one's own: tells what each message is.
#include <iostream>
#include "smtpd.hpp"

struct CustomServer : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;
    std::optional<std::string> process_message(const asyncore::address& peer, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options&) override {
        std::cout << "Receiving message from: " << peer.repr() << '\n'
                  << "Message addressed from: " << mailfrom << '\n'
                  << "Message addressed to  : " << rcpttos.size() << " recipients\n"
                  << "Message length        : " << data.size() << std::endl;
        return std::nullopt;   // 250 OK
    }
};

int main() {
    CustomServer server({"127.0.0.1", 1025}, {});
    asyncore::loop();
}
