// A server that fails as it is told, to try a client's patience: does it come again after 451, and only then?
// Usage: fake_upstream [port [fault...]]
//
// A fault is VERB=COUNT=ANSWER: the first COUNT times (0: always) that VERB comes, ANSWER is given instead; after
// that all goes well. The VERB "." is the end of a message; the ANSWER "close" (to any other) ends the connection.
// Without faults: RCPT=2="451 4.3.0 try again".
#include <cstdlib>
#include <iostream>

#include "smtpd.hpp"

struct fault {
    std::string verb, answer;
    int left;   // times; 0 and below: for ever
    bool over = false;
};
static std::vector<fault> faults;

// The answer that the script has for this verb; nothing when it is to go well.
static std::optional<std::string> scripted(std::string_view verb) {
    for (auto& it : faults) {
        if (it.verb != verb || it.over) continue;
        if (it.left > 0 && --it.left == 0) it.over = true;
        std::cout << verb << ": " << it.answer << std::endl;
        return it.answer;
    }
    return std::nullopt;
}

struct FaultyChannel : smtpd::SMTPChannel {
    using SMTPChannel::SMTPChannel;
    std::string answer_now;

    command find_command(std::string_view verb) override {
        const auto answer = scripted(verb);
        if (!answer) return SMTPChannel::find_command(verb);
        answer_now = *answer;
        return static_cast<command>(&FaultyChannel::fail);
    }
    void fail(argument) { answer_now == "close" ? close() : push(answer_now); }
};

struct FaultyServer : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                      const asyncore::address& from) override {
        return std::make_unique<FaultyChannel>(*this, std::move(sock), from);
    }
    std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options&) override {
        const auto answer = scripted(".");
        if (!answer)
            std::cout << "taken: " << data.size() << " bytes from " << mailfrom << " to " << rcpttos.size()
                      << std::endl;
        return answer;
    }
};

int main(int argc, char** argv) {
    for (int i = 2; i < argc; ++i) {
        const std::string text = argv[i];
        const std::size_t first = text.find('='), second = text.find('=', first + 1);
        if (second == text.npos) return std::cerr << "not VERB=COUNT=ANSWER: " << text << '\n', 2;
        faults.push_back({text.substr(0, first), text.substr(second + 1), std::atoi(text.c_str() + first + 1)});
    }
    if (argc < 3) faults.push_back({"RCPT", "451 4.3.0 try again", 2});
    try {
        FaultyServer server({"127.0.0.1", argc > 1 ? std::atoi(argv[1]) : 1025}, {});
        std::cout << "listening on " << server.socket->getsockname().str() << std::endl;
        asyncore::loop();
    } catch (const std::exception& error) {
        return std::cerr << "fake_upstream: " << error.what() << '\n', 1;
    }
}
