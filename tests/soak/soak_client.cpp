// soak_client: many SMTP clients in one program, most of them badly behaved.
//
//   soak_client load COUNT PORT KEYS
//     Opens COUNT connections and waits for their greetings; a message on each; QUIT on each. Before the second and
//     the third of these it prints a line and waits for one.
//   soak_client soak SECONDS SEED RATE HOGS IDLE PORT KEYS
//     Starts RATE clients a second, of all the kinds in soak::make(), and once in a while HOGS that just hold a
//     connection, so that the server runs out of descriptors. Client N of a seed is always the same. Nobody may
//     take longer than five times the server's IDLE seconds. Prints a line of figures each second.
//
// KEYS gets a line for each message: `a KEY` when it was acknowledged, `u KEY` when it was sent to its end and the
// client was gone before it could know. What a client was told wrongly, or too late, is a line `FAILED ...`, and the
// exit status is 1. KEY is what soak.hpp says. Linux only (epoll, all of 127/8).

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <list>
#include <random>
#include <utility>
#include <vector>

#include "soak.hpp"

namespace {

using std::chrono::milliseconds;
using std::chrono::seconds;
using steady = std::chrono::steady_clock;

constexpr std::size_t rcpt_limit = 250, size_limit = 1 << 20;   // of the server; soak.py tells it so

// ---- What is sent ------------------------------------------------------------------------------------

struct expected {
    char digit;            // that the reply begins with
    std::string key{};     // of the message that it is the answer to
    std::size_t end = 0;   // where that message ends: bytes of the turn, later of the session
};

// A text, and the replies that are waited for before the next turn.
struct turn {
    std::string text;
    std::vector<expected> replies;
    int gate = 0;   // starts when that many gates are open
};

enum class ending { close, reset, half_close, stay };

struct client {
    const char* kind = "";
    bool good = true;   // sticks to the rules and reads everything: it must get the replies that it expects
    std::deque<turn> turns;
    std::size_t cut = std::string::npos;   // after that many bytes it breaks off
    ending end = ending::close;            // how, and what it does when all turns are done
    std::size_t piece = 1 << 20;           // bytes at a time
    milliseconds gap{0};                   // between two pieces
    bool deaf = false;                     // reads nothing; later it finds out that the server has given up
    int urgent = 0;                        // how many urgent bytes it sends, one before each piece
    bool hog = false;                      // holds its connection as long as it can

    int fd = -1;
    std::deque<expected> owed;   // replies
    std::string out, line, last;
    std::size_t sent = 0, queued = 0;                    // bytes of the session
    bool shut = false, over = false, finished = false;   // writes no more; reads no more; is gone
    steady::time_point born, next;
};

std::size_t below(std::mt19937_64& random, std::size_t n) { return random() % n; }

// Lines of any bytes, with dots in front now and then.
turn message(std::mt19937_64& random, std::uint64_t id, std::size_t size) {
    std::string text, wire = std::string(id_header) + std::to_string(id) + "\r\nSubject: soak\r\n\r\n";
    while (text.size() < size) {
        const std::size_t start = text.size(), length = std::min(below(random, 79), size - start);
        if (below(random, 10) == 0) text += '.';
        for (std::size_t i = 0; i < length; i += 8) {
            std::uint64_t bits = random();
            for (int n = 0; n < 8; ++n, bits >>= 8) text += static_cast<char>(bits);
        }
        for (std::size_t i = start; i < text.size(); ++i)
            if (text[i] == '\r' || text[i] == '\n') text[i] = '.';
        wire.append(text[start] == '.' && text.size() > start ? "." : "").append(text, start).append("\r\n");
        text += '\n';
    }
    text.resize(text.empty() ? 0 : text.size() - 1);   // the last line end belongs to the end of data
    wire += size ? ".\r\n" : "\r\n.\r\n";
    const std::size_t end = wire.size();
    return {std::move(wire), {{'2', message_key(std::to_string(id), text), end}}};
}

// All of them in one go.
turn joined(std::deque<turn> turns) {
    turn one;
    for (turn& it : turns) {
        for (expected& reply : it.replies) {
            reply.end += one.text.size();
            one.replies.push_back(std::move(reply));
        }
        one.text += it.text;
    }
    return one;
}

void say(client& c, const std::string& text, char digit = '2') { c.turns.push_back({text, {{digit}}}); }

// A message to so many recipients, of whom as many as the server takes are accepted.
void mail(client& c, turn text, bool pipelined, std::size_t recipients = 1) {
    std::deque<turn> all;
    all.push_back({"MAIL FROM:<a@soak.test> BODY=8BITMIME SIZE=" + std::to_string(text.text.size()) + "\r\n", {{'2'}}});
    for (std::size_t i = 0; i < recipients; ++i)
        all.push_back({"RCPT TO:<" + std::to_string(i) + "@soak.test>\r\n", {{i < rcpt_limit ? '2' : '4'}}});
    all.push_back({"DATA\r\n", {{'3'}}});
    if (pipelined) all = {joined(std::move(all))};
    for (auto& it : all) c.turns.push_back(std::move(it));
    c.turns.push_back(std::move(text));
}

// After the greeting, all in one go.
void at_once(client& c) {
    std::deque<turn> rest = std::move(c.turns);
    c.turns = {std::move(rest.front())};
    rest.pop_front();
    c.turns.push_back(joined(std::move(rest)));
}

// ---- The engine --------------------------------------------------------------------------------------

class engine {
  public:
    engine(int port, const char* keys) : epoll_(::epoll_create1(EPOLL_CLOEXEC)), keys_(std::fopen(keys, "w")) {
        server_.sin_family = AF_INET;
        server_.sin_port = htons(static_cast<std::uint16_t>(port));
        server_.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (epoll_ < 0 || !keys_) fail("cannot start: %s", std::strerror(errno));
    }
    virtual ~engine() = default;
    engine(const engine&) = delete;
    engine& operator=(const engine&) = delete;

    bool finish() { return std::fclose(keys_) == 0 && failures_ == 0; }

  protected:
    // Waits a moment, and serves those that something has come for; then everybody.
    void pass() {
        epoll_event events[512];
        const int count = ::epoll_wait(epoll_, events, 512, 2);
        now_ = steady::now();
        for (int i = 0; i < count; ++i) receive(*static_cast<client*>(events[i].data.ptr));
        if (now_ < sweep_) return;
        sweep_ = now_ + milliseconds(2);
        for (auto it = clients_.begin(); it != clients_.end();) {
            act(*it);
            it = it->finished ? clients_.erase(it) : std::next(it);
        }
    }

    void start(client&& made) {
        client& c = clients_.emplace_back(std::move(made));
        c.fd = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
        if (c.fd < 0) fail("socket: %s", std::strerror(errno));
        const int on = 1, little = 4096;
        ::setsockopt(c.fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (c.deaf) ::setsockopt(c.fd, SOL_SOCKET, SO_RCVBUF, &little, sizeof little);
        // From eight addresses by turns, so that ports last.
        ::setsockopt(c.fd, IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, &on, sizeof on);
        sockaddr_in source{};
        source.sin_family = AF_INET;
        source.sin_addr.s_addr = htonl(INADDR_LOOPBACK + static_cast<std::uint32_t>(started_++ % 8));
        ::bind(c.fd, reinterpret_cast<sockaddr*>(&source), sizeof source);
        if (::connect(c.fd, reinterpret_cast<const sockaddr*>(&server_), sizeof server_) < 0 && errno != EINPROGRESS)
            fail("connect: %s", std::strerror(errno));
        c.born = c.next = now_;
        watch(c, EPOLL_CTL_ADD);
        act(c);
    }

    template <typename... Arguments>
    void fail(const char* format, Arguments... arguments) {
        if (++failures_ > 20) return;
        std::printf("FAILED ");
        std::printf(format, arguments...);
        std::puts("");
        std::fflush(stdout);
    }

    // Is that answer one that a good client has to put up with?
    virtual bool excused(const std::string& /*line*/) { return false; }
    virtual void ended(client& /*c*/, bool /*well*/) {}

    void leave(client& c, bool well) {
        if (c.finished) return;
        for (const auto& it : c.owed)   // sent to its end, as far as anybody here can know
            if (!it.key.empty() && it.end <= c.sent) std::fprintf(keys_, "u %s\n", it.key.c_str());
        if (c.end == ending::reset) {
            const linger at_once{1, 0};
            ::setsockopt(c.fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        }
        ::close(c.fd);
        c.finished = true;
        ended(c, well);
    }

    std::list<client> clients_;
    steady::time_point now_ = steady::now();
    steady::duration patience_{};
    std::size_t started_ = 0, acknowledged_ = 0;
    int gates_ = 0;

  private:
    void watch(client& c, int operation) const {
        epoll_event event{};
        if (!c.deaf) event.events = EPOLLIN;   // errors are told anyway
        event.data.ptr = &c;
        ::epoll_ctl(epoll_, operation, c.fd, &event);
    }

    void receive(client& c) {
        if (c.finished) return;
        if (c.deaf) return leave(c, true);   // the server has given up
        char buffer[65536];
        const ssize_t count = ::recv(c.fd, buffer, sizeof buffer, 0);
        if (count < 0 && errno == EAGAIN) return;
        if (count <= 0) return lost(c, count == 0 ? "the connection was closed" : std::strerror(errno));
        if (c.over) return;
        std::string_view in(buffer, static_cast<std::size_t>(count));
        for (std::size_t lf; !c.finished && (lf = in.find('\n')) != in.npos; in.remove_prefix(lf + 1)) {
            c.line.append(in, 0, lf + 1);
            if (c.line.size() < 4 || c.line[3] != '-') reply(c);
            c.line.clear();
        }
        c.line += in;
        act(c);
    }

    void reply(client& c) {
        c.last = c.line.substr(0, c.line.find('\r'));
        if (c.owed.empty() && !c.good) return;
        const expected due = c.owed.empty() ? expected{'-'} : c.owed.front();
        if (due.digit != c.line[0]) {
            if (c.good && !excused(c.last))
                fail("%s: %c.. was expected after %zu bytes, not %s", c.kind, due.digit, c.sent, c.last.c_str());
            return leave(c, false);
        }
        if (!due.key.empty()) {
            std::fprintf(keys_, "a %s\n", due.key.c_str());
            ++acknowledged_;
        }
        c.owed.pop_front();
    }

    void lost(client& c, const char* why) {
        if (c.good && !c.over)
            fail("%s: %s after %zu bytes; the last reply was %s", c.kind, why, c.sent, c.last.c_str());
        leave(c, !c.good || c.over);
    }

    // The client's own part: the next turn, the next piece, the end.
    void act(client& c) {
        if (c.finished) return;
        const auto age = now_ - c.born;
        if (c.deaf && age > patience_ / 2) {
            c.deaf = false;
            watch(c, EPOLL_CTL_MOD);
        }
        if (age > patience_ && !c.hog) {
            fail("%s: not done in time, after %zu bytes; the last reply was %s", c.kind, c.sent, c.last.c_str());
            return leave(c, false);
        }
        if (c.over) return;
        if (c.owed.empty() && c.out.empty()) {
            if (c.turns.empty()) return break_off(c);
            if (c.turns.front().gate > gates_) return;
            turn next = std::move(c.turns.front());
            c.turns.pop_front();
            for (auto& it : next.replies) {
                it.end += c.queued;
                c.owed.push_back(std::move(it));
            }
            c.out = std::move(next.text);
            c.queued += c.out.size();
        }
        if (c.out.empty() || now_ < c.next) return;
        c.next = now_ + c.gap;
        if (c.urgent > 0) {
            --c.urgent;
            ::send(c.fd, "!", 1, MSG_OOB | MSG_NOSIGNAL);
        }
        const auto size = std::min({c.out.size(), c.piece, c.cut - c.sent});
        const ssize_t count = ::send(c.fd, c.out.data(), size, MSG_NOSIGNAL);
        if (count < 0) return;   // there is no room; or reading will tell what has happened
        c.sent += static_cast<std::size_t>(count);
        c.out.erase(0, static_cast<std::size_t>(count));
        const bool last = c.out.empty() && c.turns.empty();
        if (c.sent == c.cut || (last && c.end == ending::half_close)) break_off(c);
    }

    void break_off(client& c) {
        if (c.end == ending::close || c.end == ending::reset) return leave(c, true);
        if (c.end == ending::half_close && !c.shut) ::shutdown(c.fd, SHUT_WR);
        c.shut = true;
        c.over = c.end == ending::stay || c.owed.empty();
        c.out.clear();
        c.turns.clear();
    }

    int epoll_;
    std::FILE* keys_;
    std::size_t failures_ = 0;
    sockaddr_in server_{};
    steady::time_point sweep_{};
};

// ---- load --------------------------------------------------------------------------------------------

class load : public engine {
  public:
    using engine::engine;

    void run(std::size_t count) {
        patience_ = seconds(300);
        std::mt19937_64 random(1);
        for (const char* say_so : {"greeted", "answered", ""}) {
            const auto waits = [this](const client& c) { return !c.turns.empty() && c.turns[0].gate > gates_; };
            do {
                // So many at a time that none is lost in the queue of connections to accept.
                auto fresh = std::count_if(clients_.begin(), clients_.end(), [](auto& c) { return c.last.empty(); });
                for (; gates_ == 0 && fresh < 500 && started_ < count; ++fresh) {
                    client c;
                    c.kind = "load";
                    say(c, "");
                    say(c, "EHLO soak.test\r\n");
                    c.turns.back().gate = 1;
                    mail(c, message(random, started_, 1000), false);
                    say(c, "QUIT\r\n");
                    c.turns.back().gate = 2;
                    start(std::move(c));
                }
                pass();
            } while ((gates_ == 0 && started_ < count) || !std::all_of(clients_.begin(), clients_.end(), waits));
            if (!*say_so) break;
            std::printf("%s %zu\n", say_so, clients_.size());
            std::fflush(stdout);
            char line[16];
            if (!std::fgets(line, sizeof line, stdin)) std::exit(1);
            ++gates_;
        }
    }
};

// ---- soak --------------------------------------------------------------------------------------------

class soak : public engine {
  public:
    using engine::engine;

    void run(seconds time, std::uint64_t seed, std::size_t rate, std::size_t hogs, seconds idle) {
        seed_ = seed;
        patience_ = 5 * idle;
        const auto begin = now_;
        const auto period = std::min<steady::duration>(time, seconds(40)) / 2;
        auto report = begin, burst = begin + period / 4;
        for (std::size_t due = 0; now_ < begin + time || !clients_.empty(); pass()) {
            const auto age = now_ - begin, phase = age % period;
            const bool running = age < time, starving = running && phase > period * 3 / 5 && phase < period * 4 / 5;
            for (; running && due < static_cast<std::size_t>(age / milliseconds(1)) * rate / 1000; ++due)
                if (clients_.size() < most_open + hogs_) begin_one();
            for (; running && now_ > burst; burst += period / 4)
                for (int i = 0; i < 200; ++i) vanish();
            starve(starving ? hogs : 0);
            if (running && !probing_ && now_ > probe_) probe();
            if (now_ < report) continue;
            report += seconds(1);
            std::printf("open %zu started %zu acknowledged %zu away %zu probe %.0f starved %.0f\n", clients_.size(),
                        started_, acknowledged_, away_, ms(slowest_), ms(slowest_starved_));
            std::fflush(stdout);
        }
    }

  private:
    using random = std::mt19937_64;
    static constexpr std::size_t most_open = 120;   // clients at a time, but for hogs and bursts

    static double ms(steady::duration time) { return std::chrono::duration<double, std::milli>(time).count(); }

    // What takes part, and how often, of 1000. Those that are not `good` may be told anything.
    void begin_one() {
        random r(seed_ * 1000003 + ++number_);
        std::uint64_t id = number_ * 10;
        client c;
        const auto letter = [&](bool pipelined, std::size_t size, std::size_t recipients = 1) {
            mail(c, message(r, id++, size), pipelined, recipients);
        };
        const auto letters = [&](bool pipelined) {
            for (std::size_t i = below(r, 3) + 1; i-- > 0;) letter(pipelined, below(r, 4000));
        };
        auto left = static_cast<std::ptrdiff_t>(below(r, 1000));
        const auto is = [&](const char* kind, int weight) {
            if (left < 0 || (left -= weight) >= 0) return false;
            c.kind = kind;
            return true;
        };
        say(c, "");
        say(c, "EHLO soak.test\r\n");
        if (is("one by one", 190)) {
            letters(false);
        } else if (is("pipelined", 190)) {
            letters(true);
        } else if (is("all at once, and closes its side", 80)) {
            letters(true);
        } else if (is("byte by byte", 30)) {
            letter(false, 200);
            c.piece = 1;
        } else if (is("slow writer", 30)) {
            letter(false, 1500);
            c.piece = 24;
            c.gap = milliseconds(20);
        } else if (is("large message", 15)) {
            letter(true, 100000 + below(r, 800000));
        } else if (is("200 recipients", 10)) {
            letter(true, 500, 200);
        } else if (is("too many recipients", 5)) {
            letter(below(r, 2) == 0, 500, rcpt_limit + 10);
        } else if (is("too large", 5)) {
            say(c, "MAIL FROM:<a@soak.test> SIZE=9999999\r\n", '5');
            for (const char* line : {"MAIL FROM:<a@soak.test>\r\n", "RCPT TO:<b@soak.test>\r\n"}) say(c, line);
            say(c, "DATA\r\n", '3');
            say(c, std::string(size_limit + 1 + below(r, 300000), 'x') + "\r\n.\r\n", '5');
            letter(true, 500);
        } else if (is("unknown verbs", 30)) {
            for (const char* line : {"BDAT 3 LAST\r\n", "STARTTLS\r\n", "AUTH PLAIN AA==\r\n", "\r\n", "\xff\xfe\r\n"})
                say(c, line, '5');
            letters(false);
        } else if (is("endless line", 10)) {
            say(c, std::string(below(r, 300000) + 1000, 'x') + "\r\n", '5');
            letter(true, 500);
        } else if (is("urgent byte", 30)) {
            letters(true);
            c.urgent = 1;
        } else if (is("idle", 15)) {
            say(c, "", '4');   // 421 comes by itself
        } else {
            c.good = false;
            c.end = static_cast<ending>(below(r, 4));
            if (is("breaks off", 260)) {
                letters(below(r, 2) == 0);
                if (below(r, 4) == 0) at_once(c);
                break_anywhere(c, r);
            } else if (is("garbage", 40)) {
                std::string bytes(below(r, 40000) + 1, '\0');
                for (char& byte : bytes) byte = static_cast<char>(r());
                for (std::size_t i = below(r, 100); i < bytes.size(); i += 100) bytes.replace(i, 2, "\r\n");
                c.turns.assign(1, {std::move(bytes), {}});
            } else if (is("never reads", 4)) {
                c.turns.assign(1, {"", {}});
                for (int i = 0; i < 250000; ++i) c.turns[0].text += "NOOP\r\n";
                c.deaf = true;
                c.end = ending::stay;
            } else if (is("drips", 20)) {
                letter(false, 100);
                c.piece = 1;
                c.gap = milliseconds(150);
            } else {
                c.kind = "urgent bytes";   // some of them end up between the others: no messages
                for (int i = 0; i < 20; ++i) say(c, "NOOP\r\n");
                c.urgent = 100;
                c.piece = 3;
            }
        }
        if (c.good && c.turns.back().replies.back().digit == '2') say(c, "QUIT\r\n");
        if (std::strncmp(c.kind, "all at once", 11) == 0) {
            at_once(c);
            c.end = ending::half_close;
        }
        start(std::move(c));
    }

    // Right after a message as often as anywhere else.
    static void break_anywhere(client& c, random& r) {
        std::vector<std::size_t> ends;
        std::size_t total = 0;
        for (const auto& it : c.turns) {
            for (const auto& reply : it.replies)
                if (!reply.key.empty()) ends.push_back(total + reply.end);
            total += it.text.size();
        }
        c.cut = below(r, 2) == 0 ? ends[below(r, ends.size())] : below(r, total);
    }

    // Connects and goes away, one way or the other.
    void vanish() {
        client c;
        c.kind = "vanishes";
        c.good = false;
        c.end = started_ % 2 ? ending::reset : ending::close;
        start(std::move(c));
    }

    void starve(std::size_t hogs) {
        if (hogs) starved_until_ = now_ + seconds(5);
        for (; hogs_ < hogs; ++hogs_) {
            client c;
            c.kind = "hog";
            c.good = false;
            c.hog = true;
            c.end = ending::stay;
            start(std::move(c));
        }
        for (auto& c : clients_)
            if (hogs == 0 && c.hog) leave(c, true);
    }

    void probe() {
        random r(seed_ + ++number_);
        client c;
        c.kind = "probe";
        say(c, "");
        say(c, "EHLO soak.test\r\n");
        mail(c, message(r, number_ * 10, 1000), false);
        say(c, "QUIT\r\n");
        if (since_ == steady::time_point()) since_ = now_;
        probing_ = true;
        start(std::move(c));
    }

    void ended(client& c, bool well) override {
        if (c.hog) --hogs_;
        if (std::strcmp(c.kind, "probe") != 0) return;
        probing_ = false;
        probe_ = now_ + milliseconds(well ? 250 : 50);
        if (!well) return;   // the next one goes on
        const auto took = now_ - std::exchange(since_, {});
        const bool starved = now_ - took < starved_until_;
        auto& slowest = starved ? slowest_starved_ : slowest_;
        slowest = std::max(slowest, took);
        if (took > (starved ? seconds(10) : seconds(2))) fail("probe: it took %.0f ms", ms(took));
    }

    bool excused(const std::string& line) override {
        const bool excuse = now_ < starved_until_ && (line == "421 Error: too many connections" ||
                                                      line == "451 Error: the next server is not available");
        if (excuse) ++away_;
        return excuse;
    }

    std::uint64_t seed_ = 0, number_ = 0;
    std::size_t hogs_ = 0, away_ = 0;
    bool probing_ = false;
    steady::time_point probe_{}, since_{}, starved_until_{};
    steady::duration slowest_{}, slowest_starved_{};
};

}   // namespace

int main(int argc, char** argv) {
    const std::vector<std::string> args(argv + 1, argv + argc);
    const bool loads = args.size() == 4 && args[0] == "load";
    if (!loads && (args.size() != 8 || args[0] != "soak")) {
        std::fputs("usage: soak_client load COUNT PORT KEYS | soak SECONDS SEED RATE HOGS IDLE PORT KEYS\n", stderr);
        return 2;
    }
    limit_files(0);
    const auto number = [&](std::size_t i) { return std::strtoul(args[i].c_str(), nullptr, 10); };
    const int port = static_cast<int>(number(args.size() - 2));
    const char* keys = args.back().c_str();
    if (loads) {
        load it(port, keys);
        it.run(number(1));
        return it.finish() ? 0 : 1;
    }
    soak it(port, keys);
    it.run(seconds(number(1)), number(2), number(3), number(4), seconds(number(5)));
    return it.finish() ? 0 : 1;
}
