#include <gtest/gtest.h>
#include "torch_fp8/format.h"
TEST(Format, Max) { EXPECT_EQ(torch_fp8::decode<torch_fp8::E4M3>(torch_fp8::encode<torch_fp8::E4M3>(1e9f)), 448.0f); }
