// DebuggingServer for people: headers and text are decoded (RFC 2047, quoted-printable, base64, charsets), attachments
// are one line each, and nothing that is printed can drive a terminal.
//
//     c++ -std=c++17 -I. tests/examples/readable.cpp smtpd.cpp asyncore.cpp -o readable
//     ./readable                                                # mail goes to 127.0.0.1:1025
//
// Usage: readable [PORT]
#include <cstdlib>
#include <iostream>

#include "mime.hpp"
#include "smtpd.hpp"

class ReadableServer : public smtpd::DebuggingServer {
  public:
    using DebuggingServer::DebuggingServer;
    std::optional<std::string> process_message(const asyncore::address& peer, const std::string& mailfrom,
                                               const std::vector<std::string>& rcpttos, std::string&& data,
                                               const smtpd::message_options& kwargs) override {
        return DebuggingServer::process_message(peer, mailfrom, rcpttos, readable(data), kwargs);
    }

  private:
    static std::string readable(std::string_view data) {
        const mime::part mail(data);
        const auto parts = mail.leaves();
        const bool has_text = std::any_of(parts.begin(), parts.end(), is_text);
        std::string to;
        for (const auto& [name, value] : mail.headers) to += one_line(name + ": " + mime::decode_words(value)) + "\n";
        for (const auto& part : parts) {
            // HTML is shown where there is no text.
            if (is_text(part) || (!has_text && !part.attachment)) {
                to += "\n" + part.text();
                if (to.back() != '\n') to += '\n';
            } else {
                const std::string name = part.filename.empty() ? "" : " " + one_line(part.filename) + ",";
                to += "\n[attachment" + name + " " + one_line(part.type) + ", " +
                      std::to_string(part.content().size()) + " bytes]\n";
            }
        }
        return to;
    }
    static bool is_text(const mime::part& it) { return it.type == "text/plain" && !it.attachment; }
    static std::string one_line(std::string text) {
        std::replace_if(
            text.begin(), text.end(), [](char c) { return c == '\n' || c == '\r'; }, ' ');
        return text;
    }
};

int main(int argc, char** argv) {
    ReadableServer server({"127.0.0.1", argc > 1 ? std::atoi(argv[1]) : 1025}, {});
    std::cout << "listening on " << server.socket->getsockname().str() << std::endl;
    asyncore::loop();
}
