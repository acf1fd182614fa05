// bench_server.cpp: our server as the bench runs it. It takes each message and drops it.
//
//   bench_server [--poll] [--proxy host:port] [port]
//
//   --poll    asyncore::loop() with poll(); else select()
//   --proxy   a PureProxy into that server
//   port      0 or absent: any free one. `port N` is printed once the server listens.
//
// A message from <heap> is answered with the bytes of heap in use, so that what an idle connection costs can
// be measured from outside.

#include <malloc.h>

#include <cstdlib>
#include <iostream>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "smtpd.hpp"

namespace {

constexpr std::size_t size_limit = 64U << 20;   // so that a message of 32 MiB and its headers pass

std::string heap_reply() {
    const struct mallinfo2 info = ::mallinfo2();
    return "250 heap " + std::to_string(info.uordblks + info.hblkhd);
}

struct bench_server : smtpd::SMTPServer {
    using SMTPServer::SMTPServer;
    std::optional<std::string> process_message(const asyncore::address& /*peer*/, const std::string& mailfrom,
                                               const std::vector<std::string>& /*rcpttos*/, std::string&& data,
                                               const smtpd::message_options& /*kwargs*/) override {
        const std::string taken = std::move(data);
        if (mailfrom == "heap") return heap_reply();
        return std::nullopt;
    }
};

asyncore::address parse_address(const std::string& text) {
    const std::size_t colon = text.rfind(':');
    return {text.substr(0, colon), std::atoi(text.c_str() + colon + 1)};
}

}   // namespace

int main(int argc, char** argv) {
    bool use_poll = false;
    asyncore::address upstream;
    asyncore::address where{"127.0.0.1", 0};
    for (int i = 1; i < argc; ++i) {
        const std::string_view arg = argv[i];
        if (arg == "--poll")
            use_poll = true;
        else if (arg == "--proxy" && i + 1 < argc)
            upstream = parse_address(argv[++i]);
        else
            where.port = std::atoi(argv[i]);
    }

    smtpd::options options;
    options.data_size_limit = size_limit;
    std::unique_ptr<smtpd::SMTPServer> server;
    if (upstream.none())
        server = std::make_unique<bench_server>(where, upstream, options);
    else
        server = std::make_unique<smtpd::PureProxy>(where, upstream, options);
    std::cout << "port " << server->socket->getsockname().port << std::endl;
    asyncore::loop(30.0, use_poll);
}
