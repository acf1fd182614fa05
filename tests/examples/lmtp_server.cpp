// An LMTP server (RFC 2033): LHLO in place of HELO and EHLO, and an answer for each recipient after the message.
// Usage: lmtp_server [PORT]. It knows the recipients whose names do not begin with "no".
#include <cstdlib>
#include <iostream>
#include "smtpd.hpp"

struct LMTPChannel : smtpd::SMTPChannel {
    using SMTPChannel::SMTPChannel;
    std::size_t answers = 1;   // that the line, or the message, in hand will get

    command find_command(std::string_view verb) override {
        if (verb == "HELO" || verb == "EHLO") return nullptr;   // 500, not recognized
        if (verb == "LHLO") return static_cast<command>(&LMTPChannel::smtp_LHLO);
        return SMTPChannel::find_command(verb);
    }
    void smtp_LHLO(argument arg) {
        if (!arg || arg->empty()) return push("501 Syntax: LHLO hostname");
        SMTPChannel::smtp_EHLO(arg);
    }
    void found_terminator() override {
        answers = smtp_state == DATA ? rcpttos.size() : 1;
        SMTPChannel::found_terminator();
    }
    // process_message() answers for each recipient. Anything else that is said of a message, such as 552 for one
    // that is too large, is said of each.
    void push(std::string_view msg) override {
        for (std::size_t left = std::exchange(answers, 1); left > 0; --left) SMTPChannel::push(msg);
    }
};

struct LMTPServer : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                      const asyncore::address& from) override {
        return std::make_unique<LMTPChannel>(*this, std::move(conn), from);
    }
    std::optional<std::string> process_message(const asyncore::address&, const std::string&,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options& kwargs) override {
        auto& channel = static_cast<LMTPChannel&>(*kwargs.channel());
        std::string answer;
        channel.answers = 1;
        for (const auto& rcptto : rcpttos) {
            const bool known = rcptto.compare(0, 2, "no") != 0;
            if (known) std::cout << data.size() << " bytes for " << rcptto << std::endl;
            if (!answer.empty()) channel.push(answer);
            answer = known ? "250 OK" : "550 no such user";
        }
        return answer;   // the last one
    }
};

int main(int argc, char** argv) {
    LMTPServer server({"127.0.0.1", argc > 1 ? std::atoi(argv[1]) : 1025}, {});
    std::cout << "listening on " << server.socket->getsockname().str() << std::endl;
    asyncore::loop();
}
