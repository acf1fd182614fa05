// Every system call fails once with every error, at every place; and every allocation. A scenario with servers,
// proxies and clients is run with the first call of a kind failing, then with the second, until a run passes
// without a fault. After each run: no crash, nothing leaked, no descriptor lost or closed twice, the loop neither
// ended nor span, at most one client was hurt, nobody was told 250 for a message that did not arrive, and whoever
// comes next is served. The program of main.cpp is run as well, until SIGTERM ends it: it ends properly, or with one
// line of complaint.
//
// Usage: faults [-v] [-a] [-q] [CALL [ERROR [NUMBER [COUNT]]]]
//   -v   show what the library logs, and where the call fails
//   -a   tell each problem, not only the first of its kind in a series
//   -q   fewer of the numbers: 1, 2, 3, then every seventh

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <set>

#include "faults.hpp"
#include "loopback.hpp"
#include "smtpd.hpp"

int program_main(int argc, char** argv);   // main.cpp's

namespace {

using asyncore::address;
using faults::call;
using faults::exposed;
using faults::plan;
using faults::sheltered;

bool verbose = false, quick = false, tell_all = false;
std::string folder;   // for sockets

// ---- stdout, in a pipe --------------------------------------------------------------------------------

// A buffer over a descriptor, as stdout is one.
class descriptor_buffer : public std::streambuf {
  public:
    int fd = -1;

  protected:
    int_type overflow(int_type c) override {
        if (sync() < 0) return traits_type::eof();
        if (c != traits_type::eof()) sputc(traits_type::to_char_type(c));
        return traits_type::not_eof(c);
    }
    int sync() override {
        const char* from = pbase();
        const char* const to = pptr();
        setp(room_, room_ + sizeof room_);
        while (from < to) {
            const ssize_t written = ::write(fd, from, static_cast<std::size_t>(to - from));
            if (written < 0 && errno == EINTR) continue;
            if (written < 0) return -1;
            from += written;
        }
        return 0;
    }

  private:
    char room_[4096];
};

// What std::cout writes while one lives.
class printed {
  public:
    printed() {
        if (::pipe(ends_) < 0) std::abort();
        ::fcntl(ends_[0], F_SETFL, O_NONBLOCK);
        buffer_.fd = ends_[1];
        before_ = std::cout.rdbuf(&buffer_);
        std::cout.clear();
    }
    ~printed() {
        std::cout.rdbuf(before_);
        std::cout.clear();
        ::close(ends_[0]);
        ::close(ends_[1]);
    }
    printed(const printed&) = delete;
    printed& operator=(const printed&) = delete;

    const std::string& text() {
        char room[4096];
        for (ssize_t got; (got = ::read(ends_[0], room, sizeof room)) > 0;) {
            text_.append(room, static_cast<std::size_t>(got));
            if (verbose) ::fwrite(room, 1, static_cast<std::size_t>(got), stderr);
        }
        return text_;
    }

  private:
    int ends_[2];
    descriptor_buffer buffer_;
    std::streambuf* before_;
    std::string text_;
};

// ---- The servers --------------------------------------------------------------------------------------

class keeper : public smtpd::SMTPServer {
  public:
    using SMTPServer::SMTPServer;
    std::vector<std::string> bodies;

    std::optional<std::string> process_message(const address&, const std::string&, const std::vector<std::string>&,
                                               std::string&& data, const smtpd::message_options&) override {
        bodies.push_back(std::move(data));
        return std::nullopt;
    }
};

// Reads what comes out of a pipe.
class reader : public asyncore::file_dispatcher {
  public:
    using file_dispatcher::file_dispatcher;
    std::string got;

    bool writable() override { return false; }
    void handle_close() override { close(); }
    void handle_read() override {
        try {
            got += recv(512);
        } catch (const std::system_error& error) {
            if (error.code() != std::errc::resource_unavailable_try_again) throw;
        }
    }
};

smtpd::options with(asyncore::map_type& map, const char* fqdn = "mx.test") {
    smtpd::options result;
    result.map = &map;
    result.fqdn = fqdn;
    return result;
}

// Mailman's side: all of LMTP that there is for one recipient.
class lmtp_keeper : public keeper {
  public:
    struct channel : smtpd::SMTPChannel {
        using SMTPChannel::SMTPChannel;
        command find_command(std::string_view verb) override {
            return SMTPChannel::find_command(verb == "LHLO" ? "EHLO" : verb);
        }
    };

    using keeper::keeper;
    std::unique_ptr<smtpd::SMTPChannel> channel_class(std::unique_ptr<asyncore::socket_type> sock,
                                                      const address& from) override {
        return std::make_unique<channel>(*this, std::move(sock), from, settings);
    }
};

const std::string LIST = "list@example.com";

// Where DEBUGSTREAM goes, under poll().
class discarding : public std::streambuf {
    int_type overflow(int_type c) override { return traits_type::not_eof(c); }
    std::streamsize xsputn(const char*, std::streamsize size) override { return size; }
} discarded;

// Everything that runs in one map.
struct house {
    asyncore::map_type map;
    keeper direct, behind;
    smtpd::DebuggingServer debugging;
    smtpd::PureProxy proxy;
    keeper local;
    lmtp_keeper lists;
    smtpd::MailmanProxy mailman;
    reader file;

    explicit house(int pipe_end)
        : direct({"127.0.0.1", 0}, {}, with(map, "")),
          behind({"localhost", 0}, {}, with(map)),
          debugging({"127.0.0.1", 0}, {}, with(map)),
          proxy({"127.0.0.1", 0}, {"two.test", port_of(behind)}, with(map, "proxy")),
          local(address::unix_path(folder + "/server"), {}, with(map)),
          lists({"127.0.0.1", 0}, {}, with(map)),
          mailman({"127.0.0.1", 0}, {"127.0.0.1", port_of(behind)}, with_lists(map, port_of(lists))),
          file(pipe_end, &map) {}

    static smtpd::options with_lists(asyncore::map_type& map, int port) {
        smtpd::options result = with(map);
        result.mailman_lists = folder;
        result.mailman_lmtp = {"127.0.0.1", port};
        return result;
    }
    smtpd::SMTPServer& server(const std::string& name) {
        if (name == "local") return local;
        if (name == "mailman") return mailman;
        if (name == "debugging") return debugging;
        return name == "proxy" ? static_cast<smtpd::SMTPServer&>(proxy) : direct;
    }
    static int port_of(const smtpd::SMTPServer& server) {
        const sheltered here;
        return server.socket->getsockname().port;
    }
};

// ---- The clients --------------------------------------------------------------------------------------

struct step {
    std::size_t replies;   // that must have come before
    std::string text;      // to be sent then
};

// A client that the loop under test knows nothing of; its calls never fail.
class talker {
  public:
    std::string name, marker, server;
    bool ends = true;            // it leaves, and waits for the end; otherwise it stays where it is
    bool half_closes = false;    // when it has sent everything
    bool sends_message = true;   // all of one
    std::size_t recipients = 1;

    talker(std::string what, std::string to, std::vector<step> steps)
        : name(std::move(what)), marker("marker of " + name), server(std::move(to)), steps_(std::move(steps)) {}
    ~talker() { hang_up(); }
    talker(const talker&) = delete;
    talker& operator=(const talker&) = delete;

    void connect(int port) {
        fd_ = ::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
        sockaddr_in in{};
        in.sin_family = AF_INET;
        in.sin_port = htons(static_cast<std::uint16_t>(port));
        in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        const int on = 1;
        ::setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        ::connect(fd_, reinterpret_cast<sockaddr*>(&in), sizeof in);
    }
    void connect(const std::string& path, const std::string& own) {
        fd_ = ::socket(AF_UNIX, SOCK_STREAM, 0);
        sockaddr_un un{};
        un.sun_family = AF_UNIX;
        own.copy(un.sun_path, sizeof un.sun_path - 1);
        ::unlink(own.c_str());
        ::bind(fd_, reinterpret_cast<sockaddr*>(&un), sizeof un);
        std::memset(un.sun_path, 0, sizeof un.sun_path);
        path.copy(un.sun_path, sizeof un.sun_path - 1);
        if (::connect(fd_, reinterpret_cast<sockaddr*>(&un), sizeof un) < 0) reset_ = true;
        ::fcntl(fd_, F_SETFL, O_NONBLOCK);
    }

    // Whether anything has moved.
    bool go_on() {
        if (fd_ < 0 || eof_ || reset_) return false;
        bool moved = false;
        char room[4096];
        for (ssize_t got; (got = ::recv(fd_, room, sizeof room, 0)) != 0;) {
            if (got < 0) {
                if (errno != EAGAIN) moved = reset_ = true;
                break;
            }
            heard_.append(room, static_cast<std::size_t>(got));
            moved = true;
        }
        if (!reset_ && ::recv(fd_, room, 1, MSG_PEEK) == 0) moved = eof_ = true;
        read_replies();
        while (at_ < steps_.size() && codes.size() >= steps_[at_].replies && !reset_) {
            if (refused() && steps_.size() > 3 && at_ + 1 < steps_.size()) at_ = steps_.size() - 1;
            const auto& text = steps_[at_].text;
            const ssize_t sent = ::send(fd_, text.data() + sent_, text.size() - sent_, MSG_NOSIGNAL);
            if (sent <= 0) break;
            moved = true;
            sent_ += static_cast<std::size_t>(sent);
            if (sent_ < text.size()) break;
            sent_ = 0;
            ++at_;
            if (at_ == steps_.size() && half_closes) ::shutdown(fd_, SHUT_WR);
        }
        return moved;
    }

    // The message was answered with 250.
    bool acknowledged() const {
        const auto at = std::find(codes.begin(), codes.end(), 354);
        return at != codes.end() && at + 1 != codes.end() && at[1] == 250;
    }
    bool finished() const {
        if (eof_ || reset_) return true;
        return !ends && at_ == steps_.size() && codes.size() >= wanted_replies;
    }
    bool happy() const {
        if (reset_ || !finished()) return false;
        if (!ends) return !eof_ && !refused();
        if (sends_message && !acknowledged()) return false;
        return half_closes || (!codes.empty() && codes.back() == 221);
    }
    bool at_end() const { return eof_ || reset_; }
    std::string story() const {
        std::string text = name + ":";
        for (const int code : codes) text += " " + std::to_string(code);
        return text + (reset_ ? " reset" : eof_ ? " eof" : " waiting");
    }
    // Without a trace: no port rests in TIME_WAIT.
    void hang_up() {
        if (fd_ < 0) return;
        const linger now{1, 0};
        ::setsockopt(fd_, SOL_SOCKET, SO_LINGER, &now, sizeof now);
        ::close(fd_);
        fd_ = -1;
    }

    std::vector<int> codes;
    std::size_t wanted_replies = 0;

  private:
    bool refused() const {
        return std::any_of(codes.begin(), codes.end(), [](int code) { return code >= 400; });
    }
    void read_replies() {
        for (std::size_t end; (end = heard_.find("\r\n")) != heard_.npos; heard_.erase(0, end + 2))
            if (end < 4 || heard_[3] != '-') codes.push_back(std::atoi(heard_.c_str()));
    }

    int fd_ = -1;
    std::vector<step> steps_;
    std::size_t at_ = 0, sent_ = 0;
    std::string heard_;
    bool eof_ = false, reset_ = false;
};

using talkers = std::vector<std::unique_ptr<talker>>;

std::string body(const std::string& name, std::size_t size) {
    std::string text = "Subject: marker of " + name + ".\r\n\r\n";
    while (text.size() < size)
        text += "..A line that begins with a dot, and another\r\n" + std::string(70, 'x') + "\r\n";
    return text + "The last line.\r\n.\r\n";
}

std::string another(std::size_t i) { return "recipient" + std::to_string(i) + "@a-rather-long-name.example.com"; }

std::unique_ptr<talker> in_turns(const std::string& name, const std::string& server, std::size_t size = 0,
                                 std::size_t recipients = 1) {
    std::vector<step> steps{{1, "EHLO client.test\r\n"}, {2, "MAIL FROM:<sender@example.com> BODY=8BITMIME\r\n"}};
    for (std::size_t i = 0; i < recipients; ++i)
        steps.push_back({3 + i, "RCPT TO:<" + (server == "mailman" && i == 0 ? LIST : another(i)) + ">\r\n"});
    steps.push_back({3 + recipients, "DATA\r\n"});
    steps.push_back({4 + recipients, body(name, size)});
    steps.push_back({5 + recipients, "QUIT\r\n"});
    auto made = std::make_unique<talker>(name, server, std::move(steps));
    made->recipients = recipients;
    return made;
}

std::unique_ptr<talker> at_once(const std::string& name, const std::string& server, bool quits) {
    auto made = std::make_unique<talker>(
        name, server,
        std::vector<step>{{0,
                           "HELO client.test\r\nNOOP\r\nMAIL FROM:<s@example.com>\r\nRCPT TO:<r@example.com>\r\n"
                           "DATA\r\n" +
                               body(name, 0) + (quits ? "QUIT\r\n" : "")}});
    made->half_closes = !quits;
    return made;
}

std::unique_ptr<talker> parked(const std::string& name, const std::string& server, std::vector<step> steps,
                               std::size_t replies) {
    auto made = std::make_unique<talker>(name, server, std::move(steps));
    made->ends = made->sends_message = false;
    made->wanted_replies = replies;
    return made;
}

// `large` is the size of the messages that take more than one piece.
talkers first_visitors(std::size_t large) {
    talkers all;
    all.push_back(in_turns("direct in turns", "direct"));
    all.push_back(at_once("direct at once", "direct", true));
    all.push_back(at_once("direct half-closed", "direct", false));
    all.push_back(in_turns("direct large", "direct", large));
    all.push_back(std::make_unique<talker>("direct nothing but QUIT", "direct", std::vector<step>{{1, "QUIT\r\n"}}));
    all.back()->sends_message = false;
    all.push_back(in_turns("debugging in turns", "debugging"));
    all.push_back(in_turns("local in turns", "local"));
    all.push_back(in_turns("proxy in turns", "proxy", 0, 2));
    all.push_back(at_once("proxy at once", "proxy", true));
    all.push_back(at_once("proxy half-closed", "proxy", false));
    all.push_back(in_turns("proxy large", "proxy", large * 3 / 2));
    all.push_back(in_turns("mailman in turns", "mailman", 0, 2));
    all.push_back(parked("parked silent", "direct", {}, 1));
    all.push_back(parked("parked in DATA", "direct",
                         {{0, "HELO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nhalf a message\r\n"}}, 5));
    all.push_back(
        parked("parked in the proxy", "proxy",
               {{0, "EHLO x\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nRSET\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n"}}, 7));
    return all;
}

// ---- One run ------------------------------------------------------------------------------------------

// Allocates nothing, so that leaks can be counted around it.
struct verdict {
    std::array<std::array<char, 2000>, 10> problems;
    std::size_t count = 0;
    bool hit = false;

    void add(const std::string& what) {
        if (count == problems.size()) return;
        auto& text = problems[count++];
        text[what.copy(text.data(), text.size() - 1)] = '\0';
    }
};

bool one_of(int error, std::initializer_list<int> all) { return std::find(all.begin(), all.end(), error) != all.end(); }

// How many may be hurt.
std::size_t may_be_hurt(const plan& fault) {
    if (fault.which == call::allocation) return static_cast<std::size_t>(fault.how_many);
    if (fault.how_many > 1) return 1000;
    if (fault.error == EINTR || fault.error == faults::one_byte) return 0;
    if (fault.error == EAGAIN && fault.which != call::connect) return 0;
    if (fault.which == call::accept)
        return fault.error == ECONNABORTED ? 0 : one_of(fault.error, {EBADF, EINVAL, ENOTSOCK, EOPNOTSUPP}) ? 1000 : 1;
    if (fault.which == call::connect && one_of(fault.error, {EINPROGRESS, EALREADY, EISCONN})) return 0;
    if (fault.which == call::getnameinfo || fault.which == call::gethostname || fault.which == call::open ||
        fault.which == call::setsockopt || fault.which == call::select || fault.which == call::poll)
        return 0;
    if (fault.which == call::close && fault.error == EBADF) return 0;
    return 1;
}

class run {
  public:
    run(const plan& fault, bool use_poll) : fault_(fault), use_poll_(use_poll) {}

    verdict operator()() {
        ::unlink((folder + "/server").c_str());   // of a run that crashed
        faults::arm(fault_);
        smtpd::DEBUGSTREAM.rdbuf(use_poll_ ? &discarded : nullptr);
        if (::pipe(pipe_) < 0) std::abort();
        {
            printed out;
            out_ = &out;
            std::unique_ptr<house> here = build();
            if (here) {
                visit(*here);
                tear_down(std::move(here));
            }
            visitors_.clear();
        }
        ::close(pipe_[0]);
        ::close(pipe_[1]);
        ::unlink((folder + "/server").c_str());
        result_.hit = faults::hit();
        faults::disarm();
        if (const int lost = faults::open_descriptors())
            result_.add(std::to_string(lost) + " descriptors are left open");
        if (faults::bad_closes()) result_.add("a descriptor is closed twice");
        return result_;
    }

  private:
    std::unique_ptr<house> build() {
        const exposed now;
        try {
            return std::make_unique<house>(pipe_[0]);
        } catch (const std::system_error&) {
            if (!faults::hit() || fault_.which == call::allocation) result_.add("the servers cannot be made");
        } catch (const std::bad_alloc&) {
            if (!faults::hit()) result_.add("the servers cannot be made");
        } catch (const std::exception& error) {
            result_.add(std::string("a constructor throws ") + error.what());
        }
        return nullptr;
    }

    void visit(house& here) {
        visitors_ = first_visitors(crawling() ? 1000 : 100000);
        for (auto& it : visitors_) connect(*it, here);
        talk(here);
        if (over_) return;
        const bool hit_before = faults::hit();
        std::size_t hurt = count_hurt();
        const std::size_t allowed = faults::hit() ? may_be_hurt(fault_) : 0;
        if (hurt > allowed)
            result_.add("clients are hurt that should not be: " + std::to_string(hurt) + " instead of at most " +
                        std::to_string(allowed) + stories());
        check_file(here, allowed > 0);
        check_delivered(here);
        const std::size_t before = visitors_.size();
        for (const char* server : {"direct", "debugging", "proxy", "local", "mailman"}) {
            visitors_.push_back(in_turns(std::string("fresh at ") + server, server));
            if (!alive(here, server)) {
                if (allowed < 1000) result_.add(std::string("the listener is closed: ") + server);
                visitors_.pop_back();
                continue;
            }
            connect(*visitors_.back(), here);
        }
        talk(here);
        if (over_) return;
        hurt = 0;
        for (std::size_t i = before; i < visitors_.size(); ++i) hurt += !visitors_[i]->happy();
        if (hurt > (hit_before && fault_.how_many == 1 ? 0 : faults::hit() ? may_be_hurt(fault_) : 0) && allowed < 1000)
            result_.add("whoever comes afterwards is not served" + stories());
        check_delivered(here);
    }

    // Byte by byte.
    bool crawling() const { return fault_.error == faults::one_byte && fault_.how_many > 1; }

    static bool alive(house& here, const std::string& server) {
        const smtpd::SMTPServer& it = here.server(server);
        return it.accepting && here.map.get(it._fileno) == &it;
    }

    void connect(talker& it, house& here) {
        if (it.server == "local")
            it.connect(folder + "/server", folder + "/a-client-with-a-name");
        else
            it.connect(house::port_of(here.server(it.server)));
    }

    // One pass; false when the loop would have ended.
    bool pass(house& here, double seconds) {
        const exposed now;
        try {
            use_poll_ ? asyncore::poll2(seconds, &here.map) : asyncore::poll(seconds, &here.map);
            return true;
        } catch (const asyncore::ExitNow&) {
            const sheltered again;
            if (fault_.which != call::write || !faults::hit()) result_.add("ExitNow without a reason");
        } catch (const std::exception& error) {
            const sheltered again;
            const bool excused =
                one_of(fault_.error, {EBADF, EINVAL}) &&
                one_of(static_cast<int>(fault_.which), {static_cast<int>(call::select), static_cast<int>(call::poll)});
            if (!excused) result_.add(std::string("the loop ends with an exception: ") + error.what());
            return true;   // as if the loop had been entered once more
        }
        over_ = true;
        return false;
    }

    void talk(house& here) {
        using namespace std::chrono;
        auto last = asyncore::clock::now();
        int quiet = 0;   // passes since then: on a busy machine one of them may take longer than all should
        for (int passes = 0;; ++passes) {
            bool moved = false, all = true;
            for (auto& it : visitors_) moved = it->go_on() || moved;
            for (auto& it : visitors_) all = all && it->finished();
            out_->text();
            if (ticks_ < 5) {
                if (::write(pipe_[1], "tick\n", 5) == 5) ++ticks_;
            }
            if (all) break;
            const auto now = asyncore::clock::now();
            quiet = moved ? 0 : quiet + 1;
            if (moved) last = now;
            if (quiet > 20 && now - last > milliseconds(400 + 20 * std::min(fault_.how_many, 20L))) {
                result_.add("somebody waits for ever" + stories());
                break;
            }
            if (passes > (crawling() ? 60000 : 4000)) {
                result_.add("the loop spins");
                break;
            }
            if (!pass(here, 0.02)) return;
        }
        for (int i = 0; i < 3 && !over_; ++i) pass(here, 0.0);
    }

    std::size_t count_hurt() const {
        return static_cast<std::size_t>(
            std::count_if(visitors_.begin(), visitors_.end(), [](const auto& it) { return !it->happy(); }));
    }

    std::string stories() const {
        std::string text;
        for (const auto& it : visitors_)
            if (!it->happy()) text += " [" + it->story() + "]";
        return text;
    }

    void check_file(house& here, bool may_be_dead) {
        std::string wanted;
        for (int i = 0; i < ticks_; ++i) wanted += "tick\n";
        if (here.file.got == wanted) return;
        if (here.file._fileno >= 0 || !may_be_dead)
            result_.add("the file's bytes are lost: " + asyncore::repr(here.file.got));
    }

    void check_delivered(house& here) {
        const std::string& text = out_->text();
        for (const auto& it : visitors_) {
            if (!it->sends_message) continue;
            const auto holds = [&](const std::string& data) {
                return data.find(it->marker + ".") != data.npos && data.find("\nThe last line.") != data.npos;
            };
            const auto check = [&](long times) {
                if (it->acknowledged() && times == 0)
                    result_.add("250 for a message that did not arrive: " + it->story());
                if (times > 1) result_.add("a message arrived twice: " + it->story());
            };
            const auto check_at = [&](const keeper& server) {
                check(std::count_if(server.bodies.begin(), server.bodies.end(), holds));
            };
            if (it->server == "debugging") {
                long times = 0;
                for (std::size_t at = 0; (at = text.find(it->marker + ".", at)) != text.npos; ++at) ++times;
                check(times);
            } else if (it->server == "mailman") {
                check_at(here.lists);
                if (it->recipients > 1) check_at(here.behind);
            } else {
                check_at(it->server == "direct" ? here.direct : it->server == "local" ? here.local : here.behind);
            }
        }
    }

    void tear_down(std::unique_ptr<house> here) {
        over_ = false;
        const exposed now;
        try {
            here->direct.stop(std::chrono::milliseconds(1));
        } catch (const std::exception& error) {
            const sheltered again;
            result_.add(std::string("stop() throws ") + error.what());
        }
        for (int i = 0; i < 40 && !over_; ++i) {
            bool all = true;
            {
                const sheltered again;
                for (auto& it : visitors_) {
                    it->go_on();
                    all = all && (it->server != "direct" || it->at_end());
                }
            }
            if (all) break;
            if (i == 39 && !faults::hit()) {
                const sheltered again;
                result_.add("a client is not let go by stop()");
            }
            pass(*here, 0.005);
        }
        here.reset();
    }

    plan fault_;
    bool use_poll_, over_ = false;
    int pipe_[2] = {-1, -1};
    int ticks_ = 0;
    printed* out_ = nullptr;
    talkers visitors_;
    verdict result_;
};

// ---- All runs -----------------------------------------------------------------------------------------

struct shared {
    long number;   // of the call that fails in the run under way
    long runs, problems;
    bool done;
    bool hit;   // of a program
};

shared* board = nullptr;

std::string text_of(const plan& fault, bool use_poll) {
    return std::string(faults::name_of(fault.which)) + " " + faults::name_of(fault.which, fault.error) + " " +
           std::to_string(fault.first) + (fault.how_many > 1 ? " x " + std::to_string(fault.how_many) : "") +
           (use_poll ? ", poll" : ", select");
}

// The runs of one kind of fault from `fault.first` on, until one passes without a fault.
void series(plan fault, bool use_poll, long only) {
    std::set<std::string> told;
    for (;; ++fault.first) {
        if (only == 0 && quick && fault.first > 3 && fault.first % 7 != 0) continue;
        board->number = fault.first;
        ++board->runs;
        ::alarm(60);
        const long before = faults::live_allocations();
        verdict result = run(fault, use_poll)();
        const long leaked = faults::live_allocations() - before;
        if (leaked != 0) result.add("allocations are left: " + std::to_string(leaked));
        for (std::size_t i = 0; i < result.count; ++i) {
            ++board->problems;
            const std::string problem = result.problems[i].data();
            const std::string kind = problem.substr(0, problem.find_first_of("[:"));
            if (told.insert(kind).second || tell_all)
                std::printf("FAILED %s: %s\n", text_of(fault, use_poll).c_str(), problem.c_str());
        }
        std::fflush(stdout);
        if (only != 0 || !result.hit) break;
    }
    board->done = true;
}

void in_a_child(plan fault, bool use_poll, long only = 0) {
    if (only) fault.first = only;
    for (int crashes = 0; crashes < 200; ++crashes) {
        board->done = false;
        std::fflush(stdout);
        const pid_t child = ::fork();
        if (child == 0) {
            faults::tell = verbose;
            series(fault, use_poll, only);
            std::exit(0);
        }
        int status = 0;
        ::waitpid(child, &status, 0);
        if (status == 0 && board->done) return;
        fault.first = board->number;
        ++board->problems;
        std::printf("FAILED %s: %s %d\n", text_of(fault, use_poll).c_str(),
                    WIFSIGNALED(status) ? "ends with signal" : "ends with status",
                    WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status));
        if (only || board->done) return;
        ++fault.first;
    }
}

// ---- The program --------------------------------------------------------------------------------------

// What it calls until it runs, and at its end.
const std::set<call> program_calls{call::allocation,  call::bind,        call::close,     call::fcntl,
                                   call::getaddrinfo, call::gethostname, call::getpwnam,  call::getsockname,
                                   call::getsockopt,  call::listen,      call::open,      call::pipe,
                                   call::select,      call::setgid,      call::setgroups, call::setsockopt,
                                   call::setuid,      call::sigaction,   call::socket};

// All that comes out of a pipe.
std::string drained(const int (&ends)[2]) {
    ::close(ends[1]);
    std::string text;
    char room[4096];
    for (ssize_t got; (got = ::read(ends[0], room, sizeof room)) > 0;) text.append(room, static_cast<std::size_t>(got));
    ::close(ends[0]);
    return text;
}

// Runs it until SIGTERM comes in its first select(); what is wrong with how it ends.
std::string run_program(const plan& fault) {
    int out[2], err[2];
    if (::pipe(out) < 0 || ::pipe(err) < 0) std::abort();
    board->hit = true;   // unless it lives to tell
    std::fflush(stdout);
    const pid_t child = ::fork();
    if (child == 0) {
        ::dup2(out[1], 1);
        ::dup2(err[1], 2);
        for (const int fd : {out[0], out[1], err[0], err[1]}) ::close(fd);
        ::alarm(10);
        std::atexit([] {
            exposed::on = false;
            board->hit = faults::hit();
        });
        faults::on_select = [] { ::raise(SIGTERM); };
        std::string args[] = {"smtpd", "localhost:0"};
        char* argv[] = {args[0].data(), args[1].data(), nullptr};
        faults::arm(fault);
        const exposed now;
        std::exit(program_main(2, argv));
    }
    const std::string told = drained(err), printed = drained(out);
    if (verbose) std::fputs(told.c_str(), stderr);
    int status = 0;
    ::waitpid(child, &status, 0);
    const bool needed =
        one_of(static_cast<int>(fault.which),
               {static_cast<int>(call::getpwnam), static_cast<int>(call::pipe), static_cast<int>(call::setgid),
                static_cast<int>(call::setgroups), static_cast<int>(call::setuid)});
    const bool logged = board->hit && printed.substr(0, 7) == "error: ";
    if (!printed.empty() && !logged) return "prints " + printed;
    if (status == 0 && told.empty()) return needed && board->hit ? "runs all the same" : "";
    const bool one_line = std::count(told.begin(), told.end(), '\n') == 1 && told.back() == '\n';
    if (WIFEXITED(status) && WEXITSTATUS(status) == 1 && one_line && board->hit) return "";
    if (WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM && fault.which == call::sigaction) return "";
    return (WIFSIGNALED(status) ? "ends with signal " + std::to_string(WTERMSIG(status))
                                : "ends with status " + std::to_string(WEXITSTATUS(status))) +
           ": " + told;
}

void program_series(plan fault, long only) {
    for (fault.first = only ? only : 1;; ++fault.first) {
        if (only == 0 && quick && fault.first > 3 && fault.first % 7 != 0) continue;
        ++board->runs;
        if (const std::string problem = run_program(fault); !problem.empty()) {
            ++board->problems;
            std::printf("FAILED program, %s: %s\n", text_of(fault, false).c_str(), problem.c_str());
        }
        if (only != 0 || !board->hit) break;
    }
}

// Deviation 28: a name stands for two addresses, and this host lacks the first.
void second_address() {
    asyncore::map_type map;
    smtpd::options with;
    with.map = &map;
    with.fqdn = "mx.test";
    faults::arm({call::bind, EADDRNOTAVAIL, 1, 1});
    const faults::exposed exposed;
    smtpd::SMTPServer server({"two.test", 0}, {}, with);
    faults::disarm();
    if (server.socket->getsockname().host == "127.0.0.1") return;
    std::printf("FAILED: a server listens at the second address when the first is not there\n");
    ++board->problems;
}

// A deadline that is further away than select() takes on macOS, which the wrapped one refuses as well.
void far_deadline() {
    struct patient : asyncore::dispatcher {
        using dispatcher::dispatcher;
        bool writable() override { return true; }
        void handle_write() override { close(); }
        asyncore::clock::time_point deadline() override { return asyncore::clock::now() + std::chrono::hours(200000); }
    };
    int fds[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM, 0, fds) < 0) return;
    asyncore::map_type map;
    {
        const faults::exposed exposed;
        patient it(std::make_unique<asyncore::socket_type>(fds[0]), &map);
        asyncore::poll(std::nullopt, &map);
    }
    ::close(fds[1]);
    if (map.empty()) return;
    std::printf("FAILED: a far deadline\n");
    ++board->problems;
}

}   // namespace

int main(int argc, char** argv) {
    std::vector<std::string> args(argv + 1, argv + argc);
    while (!args.empty() && args[0][0] == '-') {
        verbose = verbose || args[0] == "-v";
        quick = quick || args[0] == "-q";
        tell_all = tell_all || args[0] == "-a";
        args.erase(args.begin());
    }
    support::own_network();   // a listener that a fault has closed must leave its port to no other program
    board =
        static_cast<shared*>(::mmap(nullptr, sizeof *board, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0));
    const char* parent = std::getenv("TMPDIR");
    folder = std::string(parent ? parent : "/tmp") + "/faults-XXXXXX";
    if (!::mkdtemp(folder.data())) return 1;
    ::mkdir((folder + "/" + std::string(LIST).replace(LIST.find('@'), 1, ".")).c_str(), 0700);
    std::signal(SIGPIPE, SIG_DFL);
    second_address();
    far_deadline();
    if (const std::string problem = run_program({}); !problem.empty()) {
        std::printf("FAILED the program without a fault: %s\n", problem.c_str());
        return 1;
    }
    for (const bool use_poll : {false, true}) run({}, use_poll)();   // what is made once and kept
    for (const bool use_poll : {false, true})
        if (const verdict result = run({}, use_poll)(); result.count > 0) {
            std::printf("FAILED without a fault: %s\n", result.problems[0].data());
            ++board->problems;
        }
    for (std::size_t i = 1; i < static_cast<std::size_t>(call::count_); ++i) {
        const call which = static_cast<call>(i);
        if (!args.empty() && args[0] != faults::name_of(which)) continue;
        for (const int error : faults::errors_of(which)) {
            if (args.size() > 1 && args[1] != faults::name_of(which, error)) continue;
            const long only = args.size() > 2 ? std::atol(args[2].c_str()) : 0;
            if (program_calls.count(which)) program_series({which, error}, only);
            for (const bool use_poll : {false, true}) {
                if (which == (use_poll ? call::select : call::poll)) continue;
                std::vector<long> lengths{1};
                if (which == call::allocation) lengths = {1, 3, 20};
                if (which == call::accept && error == EMFILE) lengths = {1, 2};   // not even with the spare one
                if (error == faults::one_byte || error == EINTR) lengths = {1, 1000000};
                if (args.size() > 3) lengths = {std::atol(args[3].c_str())};
                for (const long length : lengths) {
                    if (length == 1000000 && error == EINTR) continue;   // nothing could ever go on
                    in_a_child({which, error, 1, length}, use_poll, only);
                }
            }
        }
    }
    std::printf("%ld runs, %ld problems\n", board->runs, board->problems);
    const std::string remove = "rm -rf '" + folder + "'";
    if (std::system(remove.c_str()) != 0) return 1;
    return board->problems != 0;
}
