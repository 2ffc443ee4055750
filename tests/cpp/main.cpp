// SPDX-License-Identifier: BSD-3-Clause
#include "check.h"

int main(int argc, char** argv) { return switchgear::test::run_tests(argc, argv); }
