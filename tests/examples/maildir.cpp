// A server that keeps mail in a Maildir. 250 is said only when the message is on the disk: the file is written
// and synced under tmp, linked into new, and that folder is synced too; so no crash loses what was
// acknowledged. What fails is an exception, and the client gets 451. Usage: maildir FOLDER [PORT]
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>
#include <cstdlib>
#include <iostream>
#include "smtpd.hpp"

int check(int result, const std::string& what) {
    if (result < 0) throw std::system_error(errno, std::generic_category(), what);
    return result;
}

// A descriptor that is closed when it goes out of sight.
struct file {
    const int fd;
    file(const std::string& path, int flags) : fd(check(::open(path.c_str(), flags | O_CLOEXEC, 0600), path)) {}
    ~file() { ::close(fd); }
    file(const file&) = delete;
    void write(std::string_view data) {
        while (!data.empty()) {
            const ssize_t n = ::write(fd, data.data(), data.size());
            if (n < 0 && errno == EINTR) continue;
            data.remove_prefix(static_cast<std::size_t>(check(static_cast<int>(n), "write")));
        }
    }
    void sync() { check(::fsync(fd), "fsync"); }
};

class MaildirServer : public smtpd::SMTPServer {
  public:
    MaildirServer(const asyncore::address& localaddr, std::string folder)
        : SMTPServer(localaddr, {}), folder_(std::move(folder)) {
        for (const std::string part : {"", "/tmp", "/new", "/cur"})
            if (::mkdir((folder_ + part).c_str(), 0700) < 0 && errno != EEXIST) check(-1, folder_ + part);
        file(folder_, O_RDONLY).sync();
        file(folder_ + "/..", O_RDONLY).sync();
    }

    std::optional<std::string> process_message(const asyncore::address&, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options&) override {
        std::string head = "Return-Path: " + (mailfrom == "<>" ? mailfrom : "<" + mailfrom + ">") + "\n";
        for (const auto& rcptto : rcpttos) head += "Delivered-To: " + rcptto + "\n";
        const std::string name = unique_name(), tmp = folder_ + "/tmp/" + name;
        try {
            file it(tmp, O_WRONLY | O_CREAT | O_EXCL);
            it.write(head), it.write(data), it.write("\n");
            it.sync();
            check(::link(tmp.c_str(), (folder_ + "/new/" + name).c_str()), "link");
            file(folder_ + "/new", O_RDONLY).sync();
        } catch (...) {
            ::unlink(tmp.c_str());
            throw;
        }
        ::unlink(tmp.c_str());
        return std::nullopt;
    }

  private:
    // No other message has it, of this process or of another: the time, the process, a number.
    std::string unique_name() {
        const auto now = std::chrono::system_clock::now().time_since_epoch();
        const auto micro = std::chrono::duration_cast<std::chrono::microseconds>(now).count();
        return std::to_string(micro / 1000000) + ".M" + std::to_string(micro % 1000000) + "P" +
               std::to_string(::getpid()) + "Q" + std::to_string(++count_) + "." + settings.fqdn;
    }
    std::string folder_;
    int count_ = 0;
};

int main(int argc, char** argv) {
    MaildirServer server({"127.0.0.1", argc > 2 ? std::atoi(argv[2]) : 1025}, argc > 1 ? argv[1] : "Maildir");
    std::cout << "listening on " << server.socket->getsockname().str() << std::endl;
    asyncore::loop();
}
