// A client says anything to PureProxy, and the next server answers anything, in any order and in any pieces; either
// may leave at any point. The client gets one reply to each command, and no yes that the next server has not given.

#include <deque>

#include "fuzz.hpp"

namespace {

namespace proxy_target {

using namespace fuzz;

// Bytes of the input that nobody says.
enum : char {
    CLIENT = 1,      // what follows is said by the client
    SERVER,          // ... by the next server
    SERVER_CLOSES,   // the connections that there are
    SERVER_RESETS,
    CLIENT_CLOSES,   // its side
    CLIENT_RESETS,
    SERVER_UNREACHABLE   // from here on
};

// What the next server should be sent for a message: X-Peer at the end of the header, and the last line's end.
std::string relayed(const std::string& data) {
    std::string sent;   // with the line ends that it will have
    for (std::size_t i = 0; i < data.size(); ++i)
        if (data[i] != '\r' || data.substr(i + 1, 1) != "\n") sent += data[i] == '\r' ? '\n' : data[i];
    auto lines = split(sent, "\n");
    if (!data.empty() && data.back() == '\r') lines.pop_back();   // what ends the message belongs to it
    lines.insert(std::find(lines.begin(), lines.end(), ""), "X-Peer: unix");
    std::string text;
    for (const auto& line : lines) text += line + "\n";
    return stuffed(text);
}

struct proxy : smtpd::PureProxy {
    using PureProxy::PureProxy;
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                      const asyncore::address& from) override {
        auto made = PureProxy::channel_class(std::move(sock), from);
        made->ignore_log_types.emplace_back("error");
        return made;
    }
};

// A connection to the next server.
struct upstream {
    std::shared_ptr<traffic> way;
    witness sees;

    explicit upstream(std::shared_ptr<traffic> its) : way(std::move(its)) { sees.watch(*way); }
};

void run(choices& input) {
    asyncore::map_type map;
    doorstep door;
    smtpd::options with;
    const unsigned flags = input.byte();
    const bool use_poll = flags & 1;
    with.map = &map;
    with.fqdn = flags & 2 ? "mx.test" : "mx";
    with.enable_SMTPUTF8 = flags & 4;
    with.decode_data = !with.enable_SMTPUTF8 && flags & 8;
    if (flags & 16) with.reply_queue_limit = 1;
    if (flags & 32) with.data_size_limit = 60;
    if (flags & 64) with.rcpt_limit = 2;
    const std::size_t room = input.byte() * 16;   // for what the proxy says to the next server, at a turn; 0: any
    proxy server({"127.0.0.1", 0}, door.where, with);
    server.close();
    const auto client = connect_to(server);
    std::deque<upstream> connections;
    bool unreachable = false, server_leaves = false;

    std::string client_said;
    const std::string_view said = input.rest().substr(0, 20000);
    const auto settle = [&] {
        for (std::size_t passes = 0;; ++passes) {
            FUZZ_CHECK(passes < 1000 + 20 * said.size(), "the loop does not come to rest");
            for (auto& way : door.let_in(map)) {
                FUZZ_CHECK(!unreachable, "who is that?");
                connections.emplace_back(std::move(way));
                connections.back().way->input_ends = server_leaves;
            }
            if (!busy(map)) return;
            pass(map, use_poll);
        }
    };
    // The newest connection is the one in use.
    const auto server_says = [&](std::string_view bytes) {
        if (!connections.empty()) connections.back().way->input += bytes;
    };
    bool server_speaks = false;
    for (const char c : said) {
        switch (c) {
            case CLIENT:
            case SERVER:
                for (auto& it : connections) it.way->room = room ? room : SIZE_MAX;
                settle();
                server_speaks = c == SERVER;
                continue;
            case SERVER_CLOSES:
                for (auto& it : connections) it.way->input_ends = true;
                continue;
            case SERVER_RESETS:
                for (auto& it : connections) it.way->broken = true;
                continue;
            case CLIENT_CLOSES:
                client->input_ends = true;
                continue;
            case CLIENT_RESETS:
                client->broken = true;
                continue;
            case SERVER_UNREACHABLE:
                settle();
                if (!std::exchange(unreachable, true)) door.close();
                continue;
            default:
                break;
        }
        if (server_speaks) {
            server_says({&c, 1});
        } else if (!client->input_ends && !client->broken) {
            client->input += c;
            client_said += c;
        }
    }
    settle();
    const bool broken_off = client->broken;
    // All leave, the next server first.
    server_leaves = true;
    for (auto& it : connections) {
        it.way->room = SIZE_MAX;
        it.way->input_ends = true;
    }
    settle();
    client->input_ends = true;
    settle();
    FUZZ_CHECK(client->closed && map.empty(), "somebody is left, though all have gone");

    // Each yes must have been the next server's.
    std::vector<witness::message> taken;
    std::size_t mail_accepted = 0, rcpt_accepted = 0;
    for (const auto& it : connections) {
        mail_accepted += it.sees.mail_accepted;
        rcpt_accepted += it.sees.rcpt_accepted;
        for (const auto& message : it.sees.messages)
            if (!message.answers.empty() && message.answers[0] / 100 == 2) taken.push_back(message);
    }
    std::size_t recipients = 0, next = 0;
    for (const auto& it : conversation(client_said, client->output, broken_off)) {
        const std::string verb = it.is_message ? "" : upper(it.said.substr(0, it.said.find(' ')));
        FUZZ_CHECK(it.code() != 421, show(it.answer));
        if (verb == "MAIL" && it.code() == 250) {
            FUZZ_CHECK(mail_accepted-- > 0, "a sender whom the next server did not accept");
            recipients = 0;
        }
        if (verb == "RCPT" && it.code() == 250) {
            FUZZ_CHECK(rcpt_accepted-- > 0, "a recipient whom the next server did not accept");
            ++recipients;
        }
        if (verb == "RSET" && it.code() == 250) recipients = 0;
        FUZZ_CHECK(it.code() != 354 || recipients > 0, "DATA without a recipient that the next server has accepted");
        const std::size_t of_message = it.is_message ? std::exchange(recipients, 0) : 0;
        if (!it.is_message || it.code() != 250) continue;
        const std::string expected = relayed(unstuffed(it.said));
        // One whose answer made no sense to the proxy is passed over: the client was told 451.
        while (next < taken.size() && (taken[next].text != expected || taken[next].recipients != of_message)) ++next;
        FUZZ_CHECK(next < taken.size(), "the next server did not take this, for as many: " + show(expected));
        ++next;
    }
}

}   // namespace proxy_target

}   // namespace

void fuzz_proxy(const std::uint8_t* data, std::size_t size) {
    fuzz::choices input(data, size);
    proxy_target::run(input);
}
