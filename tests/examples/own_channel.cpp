// A channel of one's own: users that are known, a verb more, and EHLO tells of it. Usage: own_channel [PORT]
#include <cstdlib>
#include <iostream>
#include <set>
#include "smtpd.hpp"

struct MyServer : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;
    std::set<std::string> users{"alice@example.com", "bob@example.com"};
    int count = 0;

    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                      const asyncore::address& from) override;
    std::optional<std::string> process_message(const asyncore::address&, const std::string&,
                                               const std::vector<std::string>&, std::string&& data,
                                               const smtpd::message_options&) override {
        if (data.find("lottery") != data.npos) return "554 no, thank you";
        return "250 message " + std::to_string(++count);
    }
};

struct MyChannel : smtpd::SMTPChannel {
    using SMTPChannel::SMTPChannel;
    MyServer& server() { return static_cast<MyServer&>(*smtp_server); }

    std::string refuse_RCPT(const std::string& address) override {
        return server().users.count(address) ? "" : "550 no such user";
    }
    command find_command(std::string_view verb) override {
        return verb == "XCOUNT" ? static_cast<command>(&MyChannel::smtp_XCOUNT) : SMTPChannel::find_command(verb);
    }
    std::vector<std::string> extensions() const override { return {"XCOUNT"}; }
    std::string syntax(std::string_view verb) const override {
        return verb == "XCOUNT" ? "XCOUNT" : SMTPChannel::syntax(verb);
    }
    void smtp_XCOUNT(argument arg) {
        if (arg) return push("501 Syntax: XCOUNT");
        push(smtpd::reply{250, "so far\n" + std::to_string(server().count) + " messages"}.line());
    }
};

std::unique_ptr<smtpd::SMTPChannel> MyServer::channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                            const asyncore::address& from) {
    return std::make_unique<MyChannel>(*this, std::move(conn), from);
}

int main(int argc, char** argv) {
    MyServer server({"127.0.0.1", argc > 1 ? std::atoi(argv[1]) : 1025}, {});
    std::cout << "listening on " << server.socket->getsockname().str() << std::endl;
    asyncore::loop();
}
