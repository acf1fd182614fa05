// Behind HAProxy (`send-proxy`), or another that says PROXY first, version 1: `peer` is the client, not the proxy.
//
//     proxy_protocol 1025
//     printf '%s\r\n' 'PROXY TCP4 192.0.2.7 192.0.2.1 4321 25' 'HELO x' 'MAIL FROM:<a@b>' 'RCPT TO:<c@d>' DATA '' . |
//         nc 127.0.0.1 1025
//
// Usage: proxy_protocol [PORT [PROXY...]]. Whom it believes is named by address, 127.0.0.1 and ::1 unless told. Others
// are not served: their line could name any client.
#include <arpa/inet.h>
#include <cstdlib>
#include <iostream>
#include "smtpd.hpp"

std::set<std::string> proxies{"127.0.0.1", "::1"};

std::optional<int> port_number(std::string_view text) {   // without leading zeros
    const bool digits = !text.empty() && text.size() <= 5 && text.find_first_not_of("0123456789") == text.npos;
    const int port = digits && (text == "0" || text[0] != '0') ? std::atoi(std::string(text).c_str()) : 65536;
    return port > 65535 ? std::nullopt : std::optional(port);
}

// The client that the line names; an address that is none() for UNKNOWN; nothing when the line is malformed.
std::optional<asyncore::address> client_of(std::string_view line) {
    std::vector<std::string> words;
    for (std::size_t at = 0; at <= line.size(); at += words.back().size() + 1)
        words.emplace_back(line.substr(at, line.find(' ', at) - at));
    if (words.size() < 2 || words[0] != "PROXY" || line.find('\0') != line.npos) return std::nullopt;
    if (words[1] == "UNKNOWN") return asyncore::address();   // the proxy speaks for itself, or does not know
    if (words.size() != 6 || (words[1] != "TCP4" && words[1] != "TCP6")) return std::nullopt;
    asyncore::address client;
    client.family = words[1] == "TCP4" ? AF_INET : AF_INET6;
    in6_addr binary;   // has room for either
    if (::inet_pton(client.family, words[2].c_str(), &binary) != 1) return std::nullopt;
    char plain[INET6_ADDRSTRLEN];
    client.host = ::inet_ntop(client.family, &binary, plain, sizeof plain);
    const auto port = port_number(words[4]);
    if (!port || !port_number(words[5]) || ::inet_pton(client.family, words[3].c_str(), &binary) != 1)
        return std::nullopt;
    client.port = *port;
    return client;
}

struct Channel : smtpd::SMTPChannel {
    using SMTPChannel::SMTPChannel;
    enum { header = 2 };   // a state beside COMMAND and DATA
    void start() override {
        if (proxies.count(addr.host) == 0) return close();
        smtp_state = header;
        idle_timeout = std::chrono::seconds(10);   // the banner waits for the line, but not for ever
    }
    void collect_incoming_data(std::string_view data) override {
        SMTPChannel::collect_incoming_data(data);
        if (smtp_state == header && received_lines.size() > 105) close();   // 107 bytes with CR LF
    }
    void found_terminator() override {
        if (smtp_state != header) return SMTPChannel::found_terminator();
        const auto client = client_of(std::exchange(received_lines, {}));
        if (!client || !connected) return close();
        if (!client->none()) peer = *client;
        smtp_state = COMMAND;
        idle_timeout = smtp_server->settings.idle_timeout;
        SMTPChannel::start();
    }
};

struct Server : smtpd::DebuggingServer {
    using DebuggingServer::DebuggingServer;
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                      const asyncore::address& from) override {
        return std::make_unique<Channel>(*this, std::move(conn), from);
    }
};

int main(int argc, char** argv) {
    if (argc > 2) proxies = {argv + 2, argv + argc};
    Server server({"127.0.0.1", argc > 1 ? std::atoi(argv[1]) : 1025}, {});
    std::cout << "listening on " << server.socket->getsockname().str() << std::endl;
    asyncore::loop();
}
