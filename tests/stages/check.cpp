// Runs the checks of a stage over a program, and says in plain words what is missing. Usage: check N PROGRAM
// CHECK_LIMIT is how many seconds it waits for something, 10 by default. Exit status: 0 when nothing is missing, or 1.

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace {

using namespace std::string_literals;
using steady = std::chrono::steady_clock;

struct missing : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// After the first wait in vain the others are short: the program has failed, and what else it lacks should come soon.
std::chrono::milliseconds limit{10000};

void give_up_sooner() { limit = std::min(limit, std::chrono::milliseconds(1000)); }

// 'hello CR LF'
std::string show(std::string_view bytes) {
    std::string text;
    for (const char c : bytes.substr(0, 100)) {
        const auto byte = static_cast<unsigned char>(c);
        if (c == '\r' || c == '\n')
            text += text.empty() || text.back() == ' ' ? "" : " ", text += c == '\r' ? "CR " : "LF ";
        else if (byte < 0x20 || byte >= 0x7f)
            text += "\\x"s + "0123456789abcdef"[byte >> 4] + "0123456789abcdef"[byte & 15];
        else
            text += c;
    }
    if (text.size() > 2 && (bytes.back() == '\r' || bytes.back() == '\n')) text.pop_back();
    return "'" + text + (bytes.size() > 100 ? "...' (" + std::to_string(bytes.size()) + " bytes)" : "'");
}

// Waits until the descriptor can be read from, or written to. False: not within the limit.
bool ready(int fd, short events, steady::time_point until) {
    for (;;) {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(until - steady::now()).count();
        pollfd it{fd, events, 0};
        const int count = ::poll(&it, 1, static_cast<int>(std::max<long long>(left, 0)));
        if (count > 0) return true;
        if (count == 0 || errno != EINTR) return false;
    }
}

// Appends what is there to be read. False: the other side has closed.
bool receive(int fd, std::string& to) {
    for (char bytes[65536];;) {
        const ssize_t size = ::read(fd, bytes, sizeof bytes);
        if (size > 0)
            to.append(bytes, static_cast<std::size_t>(size));
        else if (size == 0 || (errno != EAGAIN && errno != EINTR))
            return false;
        else if (errno == EAGAIN)
            return true;
    }
}

// The program under test, with what it prints. It gets "0" for a port, and is killed at the end.
class program {
  public:
    explicit program(const char* path) {
        int ends[2];
        if (::pipe(ends) < 0 || (child_ = ::fork()) < 0) throw std::runtime_error("no pipe, or no process");
        if (child_ == 0) {
            ::alarm(300);   // whatever becomes of us, it ends
            std::signal(SIGPIPE, SIG_DFL);
            ::dup2(ends[1], STDOUT_FILENO);
            ::close(ends[0]);
            ::close(ends[1]);
            ::execl(path, path, "0", static_cast<char*>(nullptr));
            ::_exit(127);
        }
        ::close(ends[1]);
        out_ = ends[0];
        ::fcntl(out_, F_SETFL, O_NONBLOCK);
    }
    ~program() {
        if (child_ > 0) {
            ::kill(child_, SIGKILL);
            ::waitpid(child_, nullptr, 0);
        }
        ::close(out_);
    }
    program(const program&) = delete;
    program& operator=(const program&) = delete;

    // Waits until it has printed the text. CR LF and LF are the same, written as repr() writes them or as they are.
    bool prints(const std::string& text) {
        const auto until = steady::now() + limit;
        while (printed().find(text) == std::string::npos) {
            if (!ready(out_, POLLIN, until) || !receive(out_, raw_)) break;
        }
        if (printed().find(text) != std::string::npos) return true;
        give_up_sooner();
        return false;
    }
    std::string printed() const {
        std::string text = raw_;
        for (const char* end : {"\\r\\n", "\r\n", "\\n"})
            for (std::size_t at = 0; (at = text.find(end, at)) != text.npos;) text.replace(at, std::strlen(end), "\n");
        return text;
    }
    // How the program has ended by itself; "" when it runs. The end of its output comes a moment before its own.
    std::string end() {
        int status = 0;
        const auto soon = steady::now() + std::chrono::milliseconds(500);
        bool open = true;
        while (open && ready(out_, POLLIN, soon)) open = receive(out_, raw_);
        if (open || ::waitpid(child_, &status, 0) != child_) return "";
        child_ = -1;
        return WIFSIGNALED(status)
                   ? "by signal " + std::to_string(WTERMSIG(status)) + ", " + ::strsignal(WTERMSIG(status))
                   : "with status " + std::to_string(WEXITSTATUS(status));
    }
    void forget_what_was_printed() {
        receive(out_, raw_);
        raw_.clear();
    }

    int port = 0;

  private:
    pid_t child_ = -1;
    int out_ = -1;
    std::string raw_;
};

class client {
  public:
    explicit client(const program& server) {
        fd_ = ::socket(AF_INET, SOCK_STREAM, 0);
        const int small = 65536;   // else the system alone would hold megabytes
        for (const int option : {SO_RCVBUF, SO_SNDBUF}) ::setsockopt(fd_, SOL_SOCKET, option, &small, sizeof small);
        sockaddr_in where{};
        where.sin_family = AF_INET;
        where.sin_port = htons(static_cast<std::uint16_t>(server.port));
        where.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        if (::connect(fd_, reinterpret_cast<const sockaddr*>(&where), sizeof where) < 0) {
            const std::string why = std::strerror(errno);
            ::close(fd_);
            throw missing("a client cannot connect: " + why);
        }
        ::fcntl(fd_, F_SETFL, O_NONBLOCK);
    }
    ~client() { leave(); }
    client(const client&) = delete;
    client& operator=(const client&) = delete;

    void leave() {
        if (fd_ >= 0) ::close(fd_);
        fd_ = -1;
    }
    // As a machine does that loses its power and comes back: its answer is a reset.
    void leave_rudely() {
        const linger at_once{1, 0};
        ::setsockopt(fd_, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
        leave();
    }

    // Sends all; what comes meanwhile is kept.
    client& send(std::string_view bytes) {
        said_ += (said_.empty() ? "" : " then ") + show(bytes);
        const auto until = steady::now() + limit;
        while (!bytes.empty()) {
            if (const std::size_t taken = send_some(bytes)) {
                bytes.remove_prefix(taken);
            } else if (gone_ || !ready(fd_, POLLIN | POLLOUT, until)) {
                give_up_sooner();
                throw missing("sent " + said_ + ", which was not taken");
            }
            gone_ = !receive(fd_, heard_) || gone_;
        }
        return *this;
    }
    // What there is room for; it reads nothing.
    std::size_t send_some(std::string_view bytes) {
        const ssize_t taken = ::send(fd_, bytes.data(), bytes.size(), 0);
        if (taken < 0 && errno != EAGAIN && errno != EINTR) gone_ = true;
        return taken > 0 ? static_cast<std::size_t>(taken) : 0;
    }

    // These bytes, and no others before them.
    void hears(std::string_view bytes) {
        wait([&] { return heard_.size() >= bytes.size() || heard_ != bytes.substr(0, heard_.size()); });
        if (heard_.substr(0, bytes.size()) != bytes) fail(show(bytes) + " back");
        forget(bytes.size());
    }
    void hears_line(std::string_view line) { hears(std::string(line) + "\r\n"); }

    // A reply, all its lines.
    std::string reply(std::string_view code) {
        std::size_t end = 0;
        const auto complete = [&] {
            for (std::size_t begin = 0; (end = heard_.find("\r\n", begin)) != heard_.npos; begin = end + 2)
                if (heard_.substr(begin + 3, 1) != "-" || end < begin + 3) return true;
            return false;
        };
        wait(complete);
        if (!complete() || heard_.substr(0, code.size()) != code) fail("a reply " + std::string(code));
        const std::string text = heard_.substr(0, end);
        forget(end + 2);
        return text;
    }
    std::string ask(std::string_view command, std::string_view code) {
        send(std::string(command) + "\r\n");
        return reply(code);
    }

    void has_heard_nothing() {
        receive(fd_, heard_);
        if (!heard_.empty()) fail("nothing yet");
    }
    void hears_the_end() {
        wait([] { return false; });
        if (!gone_ || !heard_.empty()) fail("the end of the connection");
    }
    // Of what comes before it, nothing is said.
    void wait_for_the_end() {
        wait([] { return false; });
        heard_.clear();
    }
    void finish_sending() { ::shutdown(fd_, SHUT_WR); }
    bool gone() const { return gone_; }
    // Whether the server has closed, after all that has been done by now.
    bool look_whether_gone() { return gone_ = !receive(fd_, heard_) || gone_; }

  private:
    template <typename Done>
    void wait(Done done) {
        const auto until = steady::now() + limit;
        while (!done() && !gone_) {
            if (!ready(fd_, POLLIN, until)) return give_up_sooner();
            gone_ = !receive(fd_, heard_);
        }
    }
    [[noreturn]] void fail(const std::string& expected) {
        throw missing((said_.empty() ? "" : "sent " + said_ + ", ") + "expected " + expected + ", heard " +
                      (!heard_.empty() ? show(heard_)
                       : gone_         ? "the end of the connection"
                                       : "nothing"));
    }
    void forget(std::size_t size) {
        heard_.erase(0, size);
        said_.clear();
    }

    int fd_;
    bool gone_ = false;
    std::string said_, heard_;
};

// Sends and never reads. It is asked after each refusal whether the server is at work, by a question and its answer.
// Returns the bytes that were taken.
std::size_t flood(client& who, std::size_t most, const std::function<void()>& ask_another) {
    const std::string bytes(65536, 'x');
    std::size_t taken = 0;
    for (int refusals = 0; refusals < 300 && taken < most && !who.gone(); ++refusals) {
        while (const std::size_t some = who.send_some(bytes)) taken += some, refusals = 0;
        ask_another();
    }
    return taken;
}
constexpr std::size_t too_much = 24 << 20;   // bytes; the system's own buffers take less

// ---------------------------------------------------------------------------------------------------------
// The checks
// ---------------------------------------------------------------------------------------------------------

struct check {
    int first, last;   // of these stages
    const char* what;
    void (*run)(program&);
    bool essential = false;   // without it the others make no sense
};

// A client that has said HELO, with a sender and a recipient when it is asked for.
struct mail_client : client {
    explicit mail_client(const program& server, std::string_view until = "HELO") : client(server) {
        reply("220");
        ask("HELO client.test", "250");
        if (until == "HELO") return;
        ask("MAIL FROM:<a@b.test>", "250");
        ask("RCPT TO:<c@d.test>", "250");
        if (until == "DATA") ask("DATA", "354");
    }
};

// The text is sent after 354. It should be printed as the second one, and not as the third.
void message(program& it, std::string_view sent, const std::string& printed, const std::string& but_not = "\t") {
    it.forget_what_was_printed();
    mail_client a(it, "DATA");
    a.send(sent);
    a.reply("250");
    if (!it.prints(printed) || it.printed().find(but_not) != std::string::npos)
        throw missing("sent " + show(sent) + ", expected " + show(printed) + " in what is printed, found " +
                      show(it.printed()));
}

const check checks[] = {
    {1, 5, "The program prints the port that it listens on",
     [](program& it) {
         if (!it.prints(":") || !it.prints("\n")) throw missing("printed " + show(it.printed()));
         const std::string text = it.printed();
         it.port = std::atoi(text.c_str() + text.rfind(':', text.find('\n')) + 1);
         client a(it);
     },
     true},

    {1, 1, "What a client sends comes back",
     [](program& it) {
         client a(it);
         a.send("hello").hears("hello");
         a.send("again").hears("again");
     }},
    {1, 1, "Two clients are served at once, each with its own bytes",
     [](program& it) {
         client a(it), b(it);
         b.send("two").hears("two");
         a.send("one").hears("one");
         b.send("three").hears("three");
     }},
    {1, 1, "A client that leaves takes no other along",
     [](program& it) {
         client a(it), b(it), c(it);
         a.send("a").hears("a");
         b.send("b").hears("b");
         a.leave();
         b.leave_rudely();
         c.send("still here").hears("still here");
         client d(it);
         d.send("a new one").hears("a new one");
     }},
    {1, 1, "A client whose connection has ended is let go",
     [](program& it) {
         client a(it);
         a.send("x").hears("x");
         a.finish_sending();
         a.hears_the_end();
     }},
    {1, 1, "Many bytes come back, all of them and in their order",
     [](program& it) {
         client a(it);
         std::string bytes;
         while (bytes.size() < 24000000) bytes += std::to_string(bytes.size()) + " ";
         std::size_t taken = 0;   // more than there is room for, at first
         while (const std::size_t some = a.send_some(bytes.substr(taken, 1000000))) taken += some;
         a.send(bytes.substr(taken));
         a.hears(bytes);
     }},
    {1, 1, "A client that never reads does not fill the memory",
     [](program& it) {
         client a(it), b(it);
         if (flood(a, too_much, [&] { b.send("x").hears("x"); }) >= too_much)
             throw missing("sent " + std::to_string(too_much) +
                           " bytes and read none, expected that the server "
                           "stops reading, but all were taken");
     }},

    {2, 2, "A line comes back, with its end",
     [](program& it) {
         client a(it);
         a.send("hello\r\n").hears_line("hello");
     }},
    {2, 2, "A line that comes in two packets is one line",
     [](program& it) {
         client a(it), b(it);
         b.send("b\r\n").hears_line("b");
         a.send("he");
         b.send("b again\r\n").hears_line("b again");   // by then the server has seen the first packet
         a.has_heard_nothing();
         a.send("llo\r\n").hears_line("hello");
     }},
    {2, 2, "The end of a line may come in two packets",
     [](program& it) {
         client a(it), b(it);
         b.send("b\r\n").hears_line("b");
         a.send("hello\r");
         b.send("b again\r\n").hears_line("b again");
         a.has_heard_nothing();
         a.send("\n").hears_line("hello");
     }},
    {2, 2, "Two lines in one packet are two lines",
     [](program& it) {
         client a(it);
         a.send("one\r\ntwo\r\n").hears_line("one");
         a.hears_line("two");
     }},
    {2, 2, "Each client has a line of its own",
     [](program& it) {
         client a(it), b(it), c(it);
         a.send("one ");
         b.send("two ");
         c.send("c\r\n").hears_line("c");   // by then the server has seen the others' first halves
         a.send("line\r\n").hears_line("one line");
         b.send("lines\r\n").hears_line("two lines");
     }},
    {2, 2, "An empty line is a line",
     [](program& it) {
         client a(it);
         a.send("\r\n").hears_line("");
     }},
    {2, 2, "A line that never ends does not fill the memory",
     [](program& it) {
         client a(it), b(it);
         if (flood(a, too_much, [&] { b.send("x\r\n").hears_line("x"), a.look_whether_gone(); }) >= too_much)
             throw missing("sent " + std::to_string(too_much) +
                           " bytes without CR LF, expected the end of the "
                           "connection, but all were taken");
     }},

    {3, 5, "The server speaks first",
     [](program& it) {
         client a(it);
         a.reply("220");
     },
     true},
    {3, 5, "HELO with a name is taken", [](program& it) { mail_client a(it); }},
    {3, 5, "HELO without a name is not",
     [](program& it) {
         client a(it);
         a.reply("220");
         a.ask("HELO", "501");
     }},
    {3, 5, "A verb may be written in small letters",
     [](program& it) {
         client a(it);
         a.reply("220");
         a.ask("helo client.test", "250");
     }},
    {3, 5, "NOOP does nothing, and is taken", [](program& it) { mail_client(it).ask("NOOP", "250"); }},
    {3, 5, "An unknown verb is refused, and the session goes on",
     [](program& it) {
         mail_client a(it);
         a.ask("FOO", "500");
         a.ask("NOOP", "250");
     }},
    {3, 5, "Commands that come in one packet get their replies in their order",
     [](program& it) {
         mail_client a(it);
         a.send("NOOP\r\nFOO\r\nNOOP\r\n").reply("250");
         a.reply("500");
         a.reply("250");
     }},
    {3, 5, "After QUIT come a last reply and the end of the connection",
     [](program& it) {
         mail_client a(it);
         a.ask("QUIT", "221");
         a.hears_the_end();
     }},
    {3, 5, "QUIT ends no other session",
     [](program& it) {
         mail_client a(it), b(it);
         a.send("QUIT\r\n");
         a.wait_for_the_end();
         b.ask("NOOP", "250");
         mail_client c(it);
     }},

    {4, 5, "MAIL, RCPT, DATA and a text with a dot at its end are a message",
     [](program& it) {
         mail_client a(it, "DATA");
         a.send("Subject: one\r\n\r\ntext\r\n.\r\n").reply("250");
     }},
    {4, 5, "The sender, the recipients and the text are printed",
     [](program& it) {
         it.forget_what_was_printed();
         mail_client a(it, "RCPT");
         a.ask("RCPT TO:<e@f.test>", "250");
         a.ask("DATA", "354");
         a.ask("Subject: two\r\n\r\ntext\r\n.", "250");
         for (const char* part : {"a@b.test", "c@d.test", "e@f.test", "Subject: two\n\ntext"})
             if (!it.prints(part)) throw missing("printed was "s + show(it.printed()) + ", expected " + show(part));
     }},
    {4, 5, "RCPT has to wait for MAIL", [](program& it) { mail_client(it).ask("RCPT TO:<c@d.test>", "503"); }},
    {4, 5, "DATA has to wait for RCPT",
     [](program& it) {
         mail_client a(it);
         a.ask("MAIL FROM:<a@b.test>", "250");
         a.ask("DATA", "503");
     }},
    {4, 5, "A second MAIL has to wait for the end of the first",
     [](program& it) {
         mail_client a(it, "RCPT");
         a.ask("MAIL FROM:<e@f.test>", "503");
     }},
    {4, 5, "The dot that a client puts before a dot is taken away",
     [](program& it) { message(it, "one\r\n..two.\r\n...three\r\n.\r\n", "one\n.two.\n..three"); }},
    {4, 5, "The first line of a text is no different",
     [](program& it) { message(it, "..one\r\ntwo\r\n.\r\n", ".one\ntwo", "..one"); }},
    {4, 5, "A dot at once is the end of an empty text",
     [](program& it) {
         mail_client a(it, "DATA");
         a.ask(".", "250");
     }},
    {4, 5, "A line of the text that looks like a command is text",
     [](program& it) { message(it, "one\r\nRSET\r\nQUIT\r\n.\r\n", "one\nRSET\nQUIT"); }},
    {4, 5, "The end of a text may come byte by byte",
     [](program& it) {
         mail_client a(it, "DATA"), b(it);
         a.send("text");
         for (const char* byte : {"\r", "\n", ".", "\r"}) {
             a.send(byte);
             b.ask("NOOP", "250");   // by then the server has seen the byte
             a.has_heard_nothing();
         }
         a.send("\n").reply("250");
     }},
    {4, 5, "After a message the next one begins anew",
     [](program& it) {
         mail_client a(it, "DATA");
         a.ask("one\r\n.", "250");
         a.ask("RCPT TO:<e@f.test>", "503");
         it.forget_what_was_printed();
         a.ask("MAIL FROM:<g@h.test>", "250");
         a.ask("RCPT TO:<i@j.test>", "250");
         a.ask("DATA", "354");
         a.ask("two\r\n.", "250");
         if (!it.prints("two")) throw missing("the second text is not printed");
         if (it.printed().find("c@d.test") != std::string::npos)
             throw missing("the second message has a recipient of the first, in " + show(it.printed()));
     }},

    {5, 5, "EHLO is answered with what the server can do, SIZE among it",
     [](program& it) {
         client a(it);
         a.reply("220");
         const std::string offered = a.ask("EHLO client.test", "250");
         if (offered.find("SIZE") == offered.npos) throw missing("heard " + show(offered) + ", expected SIZE in it");
     }},
    {5, 5, "MAIL has to wait for HELO",
     [](program& it) {
         client a(it);
         a.reply("220");
         a.ask("MAIL FROM:<a@b.test>", "503");
     }},
    {5, 5, "A sender that is no address is refused", [](program& it) { mail_client(it).ask("MAIL nonsense", "501"); }},
    {5, 5, "A message that will be too large is refused at once",
     [](program& it) {
         client a(it);
         a.reply("220");
         a.ask("EHLO client.test", "250");
         a.ask("MAIL FROM:<a@b.test> SIZE=99999999999", "552");
     }},
    {5, 5, "RSET forgets the sender",
     [](program& it) {
         mail_client a(it, "RCPT");
         a.ask("RSET", "250");
         a.ask("RCPT TO:<c@d.test>", "503");
     }},
};

}   // namespace

int main(int argc, char** argv) {
    const int stage = argc == 3 ? std::atoi(argv[1]) : 0;
    if (stage < 1 || stage > 5) {
        std::cerr << "Usage: check N PROGRAM, where N is 1 to 5\n";
        return 2;
    }
    if (const char* seconds = std::getenv("CHECK_LIMIT")) limit = std::chrono::seconds(std::atoi(seconds));
    ::alarm(240);   // nothing here takes so long
    std::signal(SIGPIPE, SIG_IGN);
    int passed = 0, failed = 0;
    program it(argv[2]);
    for (const check& one : checks) {
        if (stage < one.first || stage > one.last) continue;
        try {
            one.run(it);
            ++passed;
            std::cout << "ok: " << one.what << std::endl;
        } catch (const missing& why) {
            ++failed;
            std::cout << "MISSING: " << one.what << ": " << why.what() << std::endl;
            if (!one.essential) continue;
            std::cout << "The other checks can't be made without it." << std::endl;
            break;
        }
    }
    if (const std::string end = failed ? it.end() : ""; !end.empty())
        std::cout << "The program has ended meanwhile, " << end << std::endl;
    std::cout << "Stage " << stage << ": " << passed << " passed, " << failed << " missing" << std::endl;
    return failed ? 1 : 0;
}
