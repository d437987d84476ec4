# AUC, DeLong variance, interval, and the paired test of pROC on every data set that delong.py wrote; a line of numbers each.
suppressMessages(library(pROC))
options(digits = 17)
folder <- commandArgs(trailingOnly = TRUE)[1]
for (file in sort(list.files(folder, pattern = "csv$", full.names = TRUE))) {
  table <- read.csv(file)
  first <- roc(table$label, table$first, levels = c(0, 1), direction = "<")
  second <- roc(table$label, table$second, levels = c(0, 1), direction = "<")
  interval <- ci.auc(first, method = "delong")
  test <- roc.test(first, second, method = "delong", paired = TRUE)
  numbers <- c(first$auc, var(first), interval[1], interval[3], test$conf.int[1], test$conf.int[2], test$p.value)
  cat(format(numbers, digits = 17), "\n")
}
