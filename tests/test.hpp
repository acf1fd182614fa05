// One line to write a test: TEST(suite, name) { CHECK_EQ(1 + 1, 2); }
// A test fails by a check, by an exception, or by what it leaves behind: memory or descriptors. One that can't run here
// says so, SKIP("no IPv6"), and is counted as skipped; with NO_SKIP=1 in the environment it fails.

#ifndef TEST_HPP
#define TEST_HPP

#include <sstream>
#include <stdexcept>
#include <string>

namespace test {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool sanitized = true;
#elif defined(__has_feature)
constexpr bool sanitized = __has_feature(address_sanitizer) || __has_feature(thread_sanitizer);
#else
constexpr bool sanitized = false;
#endif

struct failure : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct skipped : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct registration {
    registration(const char* suite, const char* name, void (*body)());
};

template <typename T>
std::string show(const T& value) {
    std::ostringstream out;
    out << std::boolalpha << value;
    return out.str();
}
std::string show(const std::string& value);   // as Python shows bytes
inline std::string show(const char* value) { return show(std::string(value)); }

[[noreturn]] void fail(const char* file, int line, const std::string& what);

template <typename A, typename B>
void check_eq(const char* file, int line, const char* text, const A& a, const B& b) {
    if (!(a == b)) fail(file, line, std::string(text) + "\n    is  " + show(a) + "\n    not " + show(b));
}

}   // namespace test

#define TEST(suite, name)                                                                         \
    static void suite##_##name();                                                                 \
    static const test::registration suite##_##name##_registration(#suite, #name, suite##_##name); \
    static void suite##_##name()

#define SKIP(why) throw test::skipped(why)
#define CHECK(condition) ((condition) ? void() : test::fail(__FILE__, __LINE__, "not true: " #condition))
#define CHECK_EQ(actual, expected) test::check_eq(__FILE__, __LINE__, #actual " == " #expected, actual, expected)
#define CHECK_THROWS(expression, type)                                                \
    do {                                                                              \
        bool thrown = false;                                                          \
        try {                                                                         \
            expression;                                                               \
        } catch (const type&) {                                                       \
            thrown = true;                                                            \
        }                                                                             \
        if (!thrown) test::fail(__FILE__, __LINE__, #expression " throws no " #type); \
    } while (false)

#endif
