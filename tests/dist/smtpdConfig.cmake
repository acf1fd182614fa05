# find_package(smtpd) after `make install`; CMake's own install writes another. It gives the target smtpd::smtpd.
if(NOT TARGET smtpd::smtpd)
    get_filename_component(smtpd_prefix "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
    add_library(smtpd::smtpd STATIC IMPORTED)
    set_target_properties(smtpd::smtpd PROPERTIES
        IMPORTED_LINK_INTERFACE_LANGUAGES CXX
        IMPORTED_LOCATION "${smtpd_prefix}/lib/libsmtpd.a"
        INTERFACE_COMPILE_FEATURES cxx_std_17
        INTERFACE_INCLUDE_DIRECTORIES "${smtpd_prefix}/include")
    unset(smtpd_prefix)
endif()
