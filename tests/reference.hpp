// What the tests share that read tests/reference/: its lines and its escapes. README.md there has the format.

#ifndef REFERENCE_HPP
#define REFERENCE_HPP

#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace reference {

// A file or folder below tests/reference/: of the working directory, or of SMTPD_SOURCE_DIR.
inline std::string path(const std::string& name) {
    const char* top = std::getenv("SMTPD_SOURCE_DIR");
    return std::string(top && *top ? top : ".") + "/tests/reference/" + name;
}

inline std::vector<std::string> lines(const std::string& name) {
    std::ifstream file(path(name), std::ios::binary);
    if (!file)
        throw std::runtime_error("cannot read " + path(name) +
                                 " (run this at the top of the source tree, or set SMTPD_SOURCE_DIR)");
    std::vector<std::string> all;
    for (std::string line; std::getline(file, line);) all.push_back(line);
    return all;
}

// The bytes that a text on file stands for. {NAME} is what values(NAME) returns, a
// std::optional<std::string>.
template <typename Values>
std::string unescape(std::string_view text, const Values& values) {
    const auto need = [&](bool condition) {
        if (!condition) throw std::runtime_error("not well formed: " + std::string(text));
    };
    std::string out;
    for (std::size_t i = 0; i < text.size(); ++i) {
        if (text[i] == '\\') {
            need(++i < text.size());
            static constexpr std::string_view letters = "rnt\\{}", bytes = "\r\n\t\\{}";
            if (text[i] == 'x') {
                need(i + 2 < text.size());
                out += static_cast<char>(std::stoi(std::string(text.substr(i + 1, 2)), nullptr, 16));
                i += 2;
            } else {
                need(letters.find(text[i]) != letters.npos);
                out += bytes[letters.find(text[i])];
            }
        } else if (text[i] == '{') {
            std::size_t end = i + 1;
            while (end < text.size() && text[end] != '}') end += text[end] == '\\' ? 2u : 1u;
            need(end < text.size());
            const std::string_view inner = text.substr(i + 1, end - i - 1);
            if (const auto value = values(inner)) {
                out += *value;
            } else {
                const std::size_t star = inner.rfind('*');
                need(star != inner.npos);
                const std::string what = unescape(inner.substr(0, star), values);
                for (int n = std::stoi(std::string(inner.substr(star + 1))); n > 0; --n) out += what;
            }
            i = end;
        } else {
            out += text[i];
        }
    }
    return out;
}

}   // namespace reference

#endif
