// A gate: mail passes for some recipients only. Those of one domain go on to the next server, those of another one to a
// mail store by LMTP (Dovecot, Cyrus); all others get 550. So it is safe where PureProxy, which passes on everything,
// is not. Each reply is that of the server behind: nothing is queued here.
//
//     gate 1025 25 24
//     swaks --server 127.0.0.1:1025 --from me@example.com --to you@elsewhere.example
//
// Usage: gate [PORT [NEXTPORT [LMTPPORT]]], all of them on 127.0.0.1.
#include <cstdlib>
#include <iostream>
#include "smtpd.hpp"

struct Gate : smtpd::PureProxy {
    using PureProxy::PureProxy;
    const std::map<std::string, side> domains{{"relayed.example", side::upstream}, {"stored.example", side::lists}};

    // Domains are compared in lower case. A second @ can't hide one: what stands in front of the last is the user's.
    std::map<std::string, side>::const_iterator find(const std::string& recipient) const {
        std::string domain = recipient.substr(recipient.rfind('@') + 1);
        for (char& c : domain) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
        return domains.find(domain);
    }
    side route(const std::string& recipient) const override {
        return find(recipient)->second;
    }                                                      // refuse_RCPT was first
    bool asks_at_MAIL() const override { return false; }   // but the server of the first recipient, when that has come
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                      const asyncore::address& from) override;
    std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options& kwargs) override {
        data += '\n';   // the last line's end, which was half of the end of data
        relay(route(rcpttos[0]), mailfrom, rcpttos, std::move(data), kwargs,
              [reply = kwargs.defer()](const smtpd::reply& said) {
                  const bool told = said.code >= 250 && said.code != 421;   // otherwise it is lost
                  reply.answer(told ? said.line() : "451 Error: the next server is not available");
              });
        return std::nullopt;   // the reply has been deferred
    }
};

struct GateChannel : smtpd::ProxyChannel {
    using ProxyChannel::ProxyChannel;
    std::string refuse_RCPT(const std::string& address) override {
        const auto& gate = static_cast<Gate&>(*smtp_server);
        if (gate.find(address) == gate.domains.end()) return "550 relaying denied";
        // One message has one reply, so it goes to one server; the client sends it again for those that have to wait.
        if (!rcpttos.empty() && gate.route(address) != gate.route(rcpttos[0])) return "452 one domain at a time";
        return "";
    }
};

std::unique_ptr<smtpd::SMTPChannel> Gate::channel_class(std::unique_ptr<asyncore::socket_type> conn,
                                                        const asyncore::address& from) {
    return std::make_unique<GateChannel>(*this, std::move(conn), from);
}

int main(int argc, char** argv) {
    const auto port = [&](int at, int otherwise) { return argc > at ? std::atoi(argv[at]) : otherwise; };
    smtpd::options with;
    with.mailman_lmtp = {"127.0.0.1", port(3, 24)};
    try {
        Gate gate({"127.0.0.1", port(1, 1025)}, {"127.0.0.1", port(2, 25)}, with);
        gate.check_settings();   // the next server must be another one
        std::cout << "listening on " << gate.socket->getsockname().str() << std::endl;
        asyncore::loop();
    } catch (const std::exception& error) {
        std::cerr << "gate: " << error.what() << '\n';
        return 1;
    }
}
