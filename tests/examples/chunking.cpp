// BDAT (RFC 3030): a message in chunks that are counted, by asynchat's numeric terminator. Try it:
//     chunking 1025
//     printf '%s\r\n' 'EHLO x' 'MAIL FROM:<a@b>' 'RCPT TO:<c@d>' 'BDAT 5' 123 'BDAT 4 LAST' 67 QUIT | nc 127.0.0.1 1025
//
// Usage: chunking [PORT]. What DATA brings has \n for line ends and no doubled dots; what BDAT brings is as it was
// sent, CR LF and NUL included.
#include <strings.h>
#include <cstdlib>
#include <iostream>
#include "smtpd.hpp"

struct Channel : smtpd::SMTPChannel {
    using SMTPChannel::SMTPChannel;
    enum { chunk = 2, last_chunk };   // states beside COMMAND and DATA
    std::string body, refusal;        // the chunks so far; the reply to the one under way, if it is a no
    std::size_t before = 0;           // bytes of `body` that are older
    command find_command(std::string_view verb) override {
        return verb == "BDAT" ? static_cast<command>(&Channel::smtp_BDAT) : SMTPChannel::find_command(verb);
    }
    std::vector<std::string> extensions() const override { return {"CHUNKING"}; }
    void smtp_BDAT(argument arg) {
        const std::string given(arg.value_or(""));
        const std::size_t end = std::min(given.find_first_not_of("0123456789"), given.size());
        const bool last = given.size() == end + 5 && ::strcasecmp(given.c_str() + end, " LAST") == 0;
        // Where the chunk ends can't be told then: none of it shall be taken for commands.
        if (end == 0 || end > 15 || (end < given.size() && !last))
            return push("501 Syntax: BDAT size [LAST]"), close_when_done(), end_input();
        const std::size_t size = std::stoull(given.substr(0, end));
        if (data_size_limit && size > data_size_limit - body.size()) refusal = "552 Error: Too much mail data";
        if (rcpttos.empty()) refusal = "503 Error: need RCPT command";
        smtp_state = last ? last_chunk : chunk, before = body.size();
        unread("\r\n");   // this line's end comes once more, with the chunk: a terminator of 0 would be none
        set_terminator(static_cast<std::ptrdiff_t>(size + 2));
    }
    void collect_incoming_data(std::string_view data) override {
        SMTPChannel::collect_incoming_data(data);   // which sets the idle clock
        if (smtp_state < chunk) return;
        if (refusal.empty()) body += data;   // what is refused has to be read all the same
        received_lines.clear();
    }
    void found_terminator() override {
        if (smtp_state < chunk) return SMTPChannel::found_terminator();
        const bool last = std::exchange(smtp_state, COMMAND) == last_chunk;
        set_terminator("\r\n");
        if (!refusal.empty()) return _set_rset_state(), push(std::exchange(refusal, {}));   // no more to this message
        body.erase(before, 2);
        if (!last) return push("250 OK, " + std::to_string(body.size() - before) + " bytes");
        received_lines = std::move(body);   // from here on as if DATA had brought it
        num_bytes = received_lines.size(), smtp_state = DATA;
        SMTPChannel::found_terminator();
    }
    void smtp_MAIL(argument arg) override {
        if (mailfrom.empty()) body.clear();
        SMTPChannel::smtp_MAIL(arg);
    }
    void smtp_DATA(argument arg) override {
        body.empty() || rcpttos.empty() ? SMTPChannel::smtp_DATA(arg) : push("503 Error: BDAT has begun");
    }
};

struct Server : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                      const asyncore::address& from) override {
        return std::make_unique<Channel>(*this, std::move(conn), from);
    }
    std::optional<std::string> process_message(const asyncore::address&, const std::string&,
                                               const std::vector<std::string>&, std::string&& data,
                                               const smtpd::message_options&) override {
        std::cout << data.size() << " bytes: " << asyncore::repr(data.substr(0, 1000), "b") << std::endl;
        return std::nullopt;
    }
};

int main(int argc, char** argv) {
    Server server({"127.0.0.1", argc > 1 ? std::stoi(argv[1]) : 1025}, {});
    std::cout << "listening on " << server.socket->getsockname().str() << std::endl;
    asyncore::loop();
}
