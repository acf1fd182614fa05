// A class of one's own behind the whole command line: link it with main.cpp, and `-c Counter` knows it.
#include <iostream>
#include "smtpd.hpp"

struct Counter : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;
    int count = 0;
    std::optional<std::string> process_message(const asyncore::address&, const std::string&,
                                               const std::vector<std::string>&, std::string&&,
                                               const smtpd::message_options&) override {
        std::cout << ++count << " messages" << std::endl;
        return std::nullopt;
    }
};

static const smtpd::server_class counter("Counter", [](auto&&... args) { return std::make_unique<Counter>(args...); });
