// The conversations of tests/reference/conversations/, held with our server in every way that is on file: as
// written, one byte at a time, and all at once; over a socketpair and over TCP; with select() and with
// poll(). Each file and way is a test. Replies, endings and messages are compared byte for byte.
//
// A step is over when the server has read all that was sent, and the client all that the server has sent:
// the channel counts both, so nothing here waits for a clock.

#include <dirent.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/ioctl.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <map>
#include <optional>
#include <set>
#include <utility>

#include "reference.hpp"
#include "smtpd.hpp"
#include "test.hpp"

namespace {

constexpr const char* FILES[] = {"1-greeting", "2-addresses", "3-parameters", "4-lines", "5-data", "6-closing"};
constexpr std::size_t FILE_COUNT = std::size(FILES);

enum class chunks { written, split, joined };   // as in the files: `also: split joined`
struct way {
    const char* name;
    bool tcp, poll2;
    chunks sends;
    std::size_t longest;   // bytes of input: of a longer conversation this way is not tried
};
constexpr std::size_t ANY = SIZE_MAX;
constexpr way WAYS[] = {
    {"socketpair", false, false, chunks::written, ANY},
    {"socketpair_with_poll", false, true, chunks::written, ANY},
    {"tcp", true, false, chunks::written, ANY},
    {"socketpair_byte_by_byte", false, false, chunks::split, ANY},
    {"tcp_byte_by_byte", true, false, chunks::split, 512},
    {"socketpair_all_at_once", false, false, chunks::joined, ANY},
    {"tcp_all_at_once", true, false, chunks::joined, ANY},
};
constexpr std::size_t WAY_COUNT = std::size(WAYS);

constexpr const char* FQDN = "mx.example.net";
constexpr std::size_t LONGEST_SEND = 32768;   // arrives as one recv(), as when it was recorded
constexpr std::chrono::seconds PATIENCE{5};   // until a step counts as stuck

// ---------------------------------------------------------------------------------------------------------
// The files
// ---------------------------------------------------------------------------------------------------------

struct delivery {
    std::string mailfrom;
    std::vector<std::string> rcpttos;
    std::string mail_options, rcpt_options;   // joined by spaces
    std::string data;

    bool operator==(const delivery& other) const {
        return mailfrom == other.mailfrom && rcpttos == other.rcpttos && mail_options == other.mail_options &&
               rcpt_options == other.rcpt_options && data == other.data;
    }
};

// What a server does after one client event.
struct answer {
    std::vector<delivery> messages;
    std::string said;
    std::string end;   // "EOF", "loop left"

    bool operator==(const answer& other) const {
        return messages == other.messages && said == other.said && end == other.end;
    }
    void operator+=(const answer& next) {
        messages.insert(messages.end(), next.messages.begin(), next.messages.end());
        said += next.said;
        if (end.empty()) end = next.end;
    }
};

struct event {
    enum { connect, bytes, shutdown_wr, close, rst, visitor } kind = connect;
    std::string data;
};

struct step {
    std::string source;   // the line, and its number: for a failure's text
    int line;
    event what;
    answer expected;
};

struct scenario {
    std::string name, process_message = "None";
    int line;
    smtpd::options server;
    std::vector<std::string> deviations;
    std::string also, ours_also;
    bool has_ours_also = false;
    std::vector<step> steps;   // the first is the connection

    scenario(const std::string& of, int at) : name(of), line(at), steps{{"the connection", at, {}, {}}} {}

    bool allows(chunks sends) const {
        const std::string& ways = has_ours_also ? ours_also : also;
        return sends == chunks::written || ways.find(sends == chunks::split ? "split" : "joined") != ways.npos;
    }
    std::size_t size() const {
        std::size_t sum = 0;
        for (const auto& it : steps) sum += it.what.data.size();
        return sum;
    }
};

std::string unescape(std::string_view text) {
    return reference::unescape(text, [](std::string_view name) -> std::optional<std::string> {
        if (name == "fqdn") return FQDN;
        if (name == "version") return std::string(smtpd::version);
        return std::nullopt;
    });
}

bool starts_with(std::string_view text, std::string_view start) { return text.substr(0, start.size()) == start; }

std::vector<std::string> split(std::string_view text, std::string_view by) {
    std::vector<std::string> parts;
    for (std::size_t at; (at = text.find(by)) != text.npos; text.remove_prefix(at + by.size()))
        parts.emplace_back(text.substr(0, at));
    parts.emplace_back(text);
    return parts;
}

event parse_event(std::string_view text) {
    if (text == "{shutdown_wr}") return {event::shutdown_wr, ""};
    if (text == "{close}") return {event::close, ""};
    if (text == "{rst}") return {event::rst, ""};
    if (!starts_with(text, "{visitor")) return {event::bytes, unescape(text)};
    text = text.substr(8, text.size() - 9);
    return {event::visitor, unescape(text.substr(std::min(text.find_first_not_of(' '), text.size())))};
}

void parse_option(scenario& it, const std::string& key, const std::string& value) {
    if (key == "server") {
        for (const auto& word : split(value, " ")) {
            if (word == "enable_SMTPUTF8")
                it.server.enable_SMTPUTF8 = true;
            else if (word == "decode_data")
                it.server.decode_data = true;
            else if (word == "data_size_limit=None")
                it.server.data_size_limit = 0;
            else if (starts_with(word, "data_size_limit="))
                it.server.data_size_limit = std::stoul(word.substr(16));
            else
                throw std::runtime_error("unknown option");
        }
    } else if (key == "process_message") {
        it.process_message = value;
    } else if (key == "deviation") {
        it.deviations = split(value, ", ");
    } else if (key == "also") {
        it.also = value;
    } else if (key == "ours also") {
        it.ours_also = value;
        it.has_ours_also = true;
    } else if (key != "title") {
        throw std::runtime_error("unknown line");
    }
}

void parse_message_line(answer& to, const std::string& field, std::string_view value) {
    if (field == "from") {
        to.messages.push_back({unescape(value), {}, "", "", ""});
        return;
    }
    if (to.messages.empty()) throw std::runtime_error("no `M from:` before it");
    delivery& message = to.messages.back();
    if (field == "to")
        message.rcpttos.push_back(unescape(value));
    else if (field == "data")
        message.data += unescape(value);
    else if (field == "mail_options")
        message.mail_options = unescape(value);
    else if (field == "rcpt_options")
        message.rcpt_options = unescape(value);
    else
        throw std::runtime_error("unknown field");
}

void parse_line(scenario& it, const std::string& line, int number) {
    const std::size_t colon = line.find(starts_with(line, "C+") ? "+" : ":");
    if (colon == line.npos) throw std::runtime_error("unknown line");
    const std::string key = line.substr(0, colon);
    const std::string value = line.substr(std::min(colon + 2, line.size()));
    step& last = it.steps.back();
    if (line[colon] == '+')
        last.what.data += unescape(value);
    else if (key == "C")
        it.steps.push_back({line, number, parse_event(value), {}});
    else if (key == "S" && (value == "{EOF}" || value == "{loop left}"))
        last.expected.end = value.substr(1, value.size() - 2);
    else if (key == "S")
        last.expected.said += unescape(value);
    else if (starts_with(key, "M "))
        parse_message_line(last.expected, key.substr(2), value);
    else if (key != "P" && !starts_with(key, "PM "))   // what only CPython says
        parse_option(it, key, value);
}

std::vector<scenario> parse(const std::string& name) {
    std::vector<scenario> all;
    int number = 0;
    for (const std::string& line : reference::lines(name)) {
        ++number;
        try {
            if (starts_with(line, "== ")) {
                all.emplace_back(line.substr(3), number);
            } else if (!all.empty() && !line.empty() && line[0] != '#') {
                parse_line(all.back(), line, number);
            }
        } catch (const std::exception& error) {
            throw std::runtime_error(name + ":" + std::to_string(number) + ": " + line + ": " + error.what());
        }
    }
    return all;
}

// Read once, for all ways.
const std::vector<scenario>& scenarios(std::size_t file) {
    static std::vector<scenario> all[FILE_COUNT];
    if (all[file].empty()) all[file] = parse("conversations/" + std::string(FILES[file]) + ".txt");
    return all[file];
}

// ---------------------------------------------------------------------------------------------------------
// A server that is watched
// ---------------------------------------------------------------------------------------------------------

// One connection as the server sees it; it outlives the channel.
struct traffic {
    smtpd::SMTPChannel* channel;
    bool alive = true;
    std::size_t read = 0, sent = 0;
};

class watched_channel : public smtpd::SMTPChannel {
  public:
    watched_channel(smtpd::SMTPServer& server, std::unique_ptr<asyncore::socket_type> sock,
                    const asyncore::address& from, std::deque<traffic>& all)
        : SMTPChannel(server, std::move(sock), from, server.settings), counted_(all.emplace_back(traffic{this})) {}
    ~watched_channel() override { counted_.alive = false; }
    std::size_t recv_into(char* buffer, std::size_t size) override {
        const std::size_t n = SMTPChannel::recv_into(buffer, size);
        counted_.read += n;
        return n;
    }
    std::size_t send(std::string_view data) override {
        const std::size_t n = SMTPChannel::send(data);
        counted_.sent += n;
        return n;
    }
    void close() override {
        SMTPChannel::close();
        counted_.alive = false;
    }
    void log_info(std::string_view, std::string_view) override {}

  private:
    traffic& counted_;
};

class watched_server : public smtpd::SMTPServer {
  public:
    std::vector<delivery> messages;

    watched_server(const scenario& it, asyncore::map_type& map, std::deque<traffic>& all)
        : SMTPServer({"127.0.0.1", 0}, {},
                     [&] {
                         smtpd::options with = it.server;
                         with.map = &map;
                         with.fqdn = FQDN;
                         return with;
                     }()),
          behaviour_(it.process_message),
          channels_(all) {}
    void log_info(std::string_view, std::string_view) override {}

    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                      const asyncore::address& from) override {
        if (from.family != AF_UNIX) sock->setsockopt(IPPROTO_TCP, TCP_NODELAY, 1);
        return std::make_unique<watched_channel>(*this, std::move(sock), from, channels_);
    }

    std::optional<std::string> process_message(const asyncore::address& peer, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options& kwargs) override {
        messages.push_back({mailfrom, rcpttos, join(kwargs.mail_options), join(kwargs.rcpt_options), data});
        const std::string kind = behaviour_.substr(0, behaviour_.find(' '));
        const std::string what = behaviour_.substr(std::min(kind.size() + 1, behaviour_.size()));
        if (kind == "base") return SMTPServer::process_message(peer, mailfrom, rcpttos, std::move(data), kwargs);
        if (kind == "return") return unescape(what.substr(1, what.size() - 2));
        if (kind == "throw" && (what == "ExitNow" || what == "SystemExit")) throw asyncore::ExitNow(what);
        if (kind != "None") throw std::runtime_error(behaviour_);   // throw, int
        return std::nullopt;
    }

  private:
    static std::string join(const std::vector<std::string>& words) {
        std::string text;
        for (const auto& word : words) text += (text.empty() ? "" : " ") + word;
        return text;
    }

    std::string behaviour_;
    std::deque<traffic>& channels_;
};

// ---------------------------------------------------------------------------------------------------------
// A session: one server, its client, and now and then a visitor
// ---------------------------------------------------------------------------------------------------------

struct client {
    asyncore::socket_type sock;
    traffic* theirs = nullptr;   // the server's side
    std::size_t sent = 0, got = 0;
    bool open = true;

    // Adds what has arrived; true at the end of it.
    bool receive(std::string& to) {
        char buffer[16384];
        for (;;) {
            const ssize_t n = ::recv(sock.fileno(), buffer, sizeof buffer, 0);
            if (n == 0) return true;
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) return errno != EAGAIN && errno != EWOULDBLOCK;
            to.append(buffer, static_cast<std::size_t>(n));
            got += static_cast<std::size_t>(n);
        }
    }
};

class session {
  public:
    session(const scenario& it, const way& how) : how_(how), server_(it, map_, channels_) {}
    // What has not ended by now is broken off, so that TCP remembers nothing of it.
    ~session() { reset(client_); }

    answer happen(const event& what) {
        answer result;
        if (left_) return result;
        try {
            act(what, result);
        } catch (const asyncore::ExitNow&) {
            left_ = true;
            spin([&] { return client_.receive(result.said) || client_.got == client_.theirs->sent; }, false);
            result.end = "loop left";
        }
        result.messages = std::exchange(server_.messages, {});
        return result;
    }

    // What comes when nothing is expected any more.
    answer rest() {
        answer result;
        if (!left_) pass();
        if (client_.open && client_.receive(result.said)) result.end = "EOF";
        result.messages = std::exchange(server_.messages, {});
        return result;
    }

  private:
    void pass() { how_.poll2 ? asyncore::poll2(0.0, &map_) : asyncore::poll(0.0, &map_); }

    template <typename Done>
    void spin(const Done& done, bool passes = true) {
        const auto end = asyncore::clock::now() + PATIENCE;
        while (!done()) {
            if (asyncore::clock::now() > end) throw std::runtime_error("stuck");
            if (passes) pass();
        }
    }

    client connect() {
        client made;
        const std::size_t before = channels_.size();
        if (how_.tcp) {
            made.sock = asyncore::socket_type(AF_INET, SOCK_STREAM);
            made.sock.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1);
            const int err = made.sock.connect_ex(server_.socket->getsockname());
            if (err != 0 && err != EINPROGRESS) throw std::runtime_error("connect: " + asyncore::_strerror(err));
        } else {
            int fds[2];
            if (::socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0) throw std::runtime_error("socketpair");
            made.sock = asyncore::socket_type(fds[0]);
            made.sock.setblocking(false);
            asyncore::address none;
            none.family = AF_UNIX;
            server_.handle_accepted(std::make_unique<asyncore::socket_type>(fds[1]), none);
        }
        spin([&] { return channels_.size() > before; });
        made.theirs = &channels_.back();
        return made;
    }

    // Lets the server work until neither side has anything left to do.
    void settle(client& it, answer& to, bool until_closed = false) {
        bool ended = false;
        spin([&] {
            const traffic& theirs = *it.theirs;
            if (!theirs.alive || it.got < theirs.sent) ended = it.receive(to.said) || ended;
            if (!theirs.alive) return ended;
            return !until_closed && theirs.read == it.sent && theirs.sent == it.got && theirs.channel->queued() == 0;
        });
        if (!ended) return;
        it.open = false;
        to.end = "EOF";
    }

    // Hands over the bytes, all of them before the server reads.
    void send(client& it, std::string_view data) {
        try {
            if (it.sock.send(data) != data.size()) throw std::runtime_error("not sent in one piece");
        } catch (const std::system_error& error) {
            if (asyncore::DISCONNECTED(error.code().value())) return;
            throw;
        }
        it.sent += data.size();
        if (!how_.tcp) return;   // there already
        int waiting = 0;
        spin(
            [&] {
                return !it.theirs->alive || ::ioctl(it.theirs->channel->_fileno, FIONREAD, &waiting) < 0 ||
                       static_cast<std::size_t>(waiting) == data.size();
            },
            false);
    }

    void gone(client& it) {
        it.open = false;
        spin([&] { return !it.theirs->alive; });
    }

    // A socketpair knows no RST: there it is an ordinary end.
    void reset(client& it) {
        if (it.sock.fileno() < 0) return;
        const linger at_once{1, 0};
        if (how_.tcp) ::setsockopt(it.sock.fileno(), SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        it.sock.close();
    }

    void visit(std::string_view data) {
        client visitor = connect();
        answer ignored;
        settle(visitor, ignored);
        send(visitor, data);
        settle(visitor, ignored);
        reset(visitor);
        gone(visitor);
    }

    void act(const event& what, answer& to) {
        if (what.kind == event::connect) {
            client_ = connect();
            settle(client_, to);
        } else if (what.kind == event::visitor) {
            visit(what.data);
        } else if (what.kind == event::bytes) {
            const std::size_t most = how_.sends == chunks::split ? 1 : LONGEST_SEND;
            for (std::size_t at = 0; at < what.data.size() && client_.open; at += most) {
                send(client_, std::string_view(what.data).substr(at, most));
                settle(client_, to);
            }
        } else if (client_.open && what.kind == event::shutdown_wr) {
            ::shutdown(client_.sock.fileno(), SHUT_WR);
            settle(client_, to, true);
        } else if (client_.open) {
            what.kind == event::rst ? reset(client_) : client_.sock.close();
            gone(client_);
        }
    }

    const way& how_;
    std::deque<traffic> channels_;
    asyncore::map_type map_;
    watched_server server_;
    client client_;
    bool left_ = false;   // an exception has left the loop
};

// ---------------------------------------------------------------------------------------------------------
// The comparison
// ---------------------------------------------------------------------------------------------------------

// All of an answer as one text, to be read by a person.
std::string text_of(const answer& it) {
    std::string text;
    for (const auto& message : it.messages) {
        text += "M from " + asyncore::repr(message.mailfrom);
        for (const auto& rcpt : message.rcpttos) text += " to " + asyncore::repr(rcpt);
        if (!message.mail_options.empty()) text += " mail_options " + asyncore::repr(message.mail_options);
        if (!message.rcpt_options.empty()) text += " rcpt_options " + asyncore::repr(message.rcpt_options);
        text += " data " + asyncore::repr(message.data) + "; ";
    }
    text += "S " + asyncore::repr(it.said);
    return it.end.empty() ? text : text + " {" + it.end + "}";
}

std::string excerpt(const std::string& text, std::size_t from) {
    const std::string part = text.substr(from, 400);
    return (from ? "..." : "") + part + (from + part.size() < text.size() ? "..." : "");
}

std::string difference(const answer& expected, const answer& got) {
    const std::string a = text_of(expected), b = text_of(got);
    const auto at = std::mismatch(a.begin(), a.end(), b.begin(), b.end()).first - a.begin();
    const auto from = static_cast<std::size_t>(std::max<std::ptrdiff_t>(at - 80, 0));
    return "\n        expected " + excerpt(a, from) + "\n        got      " + excerpt(b, from);
}

using fault = std::optional<std::string>;   // what is wrong, if anything

fault play_as_written(const scenario& it, const way& how, std::string& where) {
    session now(it, how);
    for (const step& next : it.steps) {
        where = std::to_string(next.line) + ": " + next.source.substr(0, 200);
        const answer got = now.happen(next.what);
        if (!(got == next.expected)) return difference(next.expected, got);
    }
    where += ", and then";
    const answer more = now.rest();
    return more == answer() ? fault() : difference({}, more);
}

// In other pieces the answers come at other times: together they are the same.
fault play_otherwise(const scenario& it, const way& how) {
    std::vector<event> events;
    answer expected, got;
    for (const step& next : it.steps) {
        expected += next.expected;
        if (how.sends == chunks::joined && next.what.kind == event::bytes && events.back().kind == event::bytes)
            events.back().data += next.what.data;
        else
            events.push_back(next.what);
    }
    session now(it, how);
    for (const event& next : events) got += now.happen(next);
    got += now.rest();
    return got == expected ? fault() : difference(expected, got);
}

fault play(const std::string& file, const scenario& it, const way& how) {
    std::string where = std::to_string(it.line) + ": all together";
    fault found;
    try {
        found = how.sends == chunks::written ? play_as_written(it, how, where) : play_otherwise(it, how);
    } catch (const std::exception& error) {
        found = std::string("\n        ") + error.what();
    }
    if (found) found = "\n    " + file + ":" + where + ", in " + it.name + " (" + how.name + ")" + *found;
    return found;
}

int replays[WAY_COUNT];   // so far
bool replayed[FILE_COUNT][WAY_COUNT];

void replay(std::size_t file, std::size_t number) {
    const way& how = WAYS[number];
    int count = 0, wrong = 0;
    std::string all;
    for (const scenario& it : scenarios(file)) {
        if (!it.allows(how.sends) || it.size() > how.longest) continue;
        ++count;
        if (const auto found = play(std::string(FILES[file]) + ".txt", it, how)) {
            all += *found;
            if (++wrong == 10) break;
        }
    }
    if (wrong)
        throw test::failure(std::to_string(wrong) + " of the first " + std::to_string(count) + " scenarios" + all);
    if (!std::exchange(replayed[file][number], true)) replays[number] += count;
}

template <std::size_t file, std::size_t number>
void replay() {
    replay(file, number);
}

template <std::size_t... i>
bool register_all(std::index_sequence<i...>) {
    (test::registration("conversations", (FILES[i / WAY_COUNT] + std::string(".") + WAYS[i % WAY_COUNT].name).c_str(),
                        replay<i / WAY_COUNT, i % WAY_COUNT>),
     ...);
    return true;
}
[[maybe_unused]] const bool registered = register_all(std::make_index_sequence<FILE_COUNT * WAY_COUNT>());

}   // namespace

TEST(conversations, every_file_is_replayed) {
    const std::string folder = reference::path("conversations");
    std::set<std::string> found, known;
    DIR* listing = ::opendir(folder.c_str());
    if (!listing) test::fail(__FILE__, __LINE__, "cannot read " + folder);
    while (const dirent* entry = ::readdir(listing)) {
        const std::string name = entry->d_name;
        if (name.size() > 4 && name.substr(name.size() - 4) == ".txt") found.insert(name);
    }
    ::closedir(listing);
    for (const std::string name : FILES) known.insert(name + ".txt");
    CHECK(found == known);
}

// At least 250 scenarios, each with a name of its own; and what has been done with them.
TEST(conversations, summary) {
    std::set<std::string> names;
    std::map<std::string, int> count;
    std::size_t total = 0;
    for (std::size_t file = 0; file < FILE_COUNT; ++file) {
        total += scenarios(file).size();
        for (const scenario& it : scenarios(file)) {
            names.insert(it.name);
            for (const auto& name : it.deviations) ++count[name];
        }
    }
    CHECK_EQ(names.size(), total);
    CHECK(total >= 250);

    static bool told = false;   // a test runs twice
    if (std::exchange(told, true)) return;
    std::printf("conversations: %zu scenarios; replays:", total);
    const char* comma = " ";
    for (std::size_t i = 0; i < WAY_COUNT; ++i)
        std::printf("%s%s %d", std::exchange(comma, ", "), WAYS[i].name, replays[i]);
    std::printf("; deviations:");
    comma = " ";
    for (const auto& [name, times] : count) std::printf("%s%s %d", std::exchange(comma, ", "), name.c_str(), times);
    std::puts("");
}
